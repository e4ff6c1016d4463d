"""The three columns of a comparison: student, teacher, and the teacher cut to a window of the student's bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...kernels.errors import RnnzooError
from ...zoo import register_auto_classes
from ..teachers import TeacherRef, resolve_teacher
from ..teachers.files import foreign_code
from ..teachers.tokenizer import first_line
from .scoring import Stream
from .store import folder_sha256
from .window_baseline import SINKS, window_attention, window_for_bytes

__all__ = ["COLUMNS", "Column", "StateSize", "open_columns"]

COLUMNS = ("student", "teacher", "window")


class StateSize:
    """Bytes of a student's state after so many tokens, from two short readings.

    A recurrent state has its size from the start. Where layers keep attention, the state grows by the same bytes for
    every token, which two readings tell; the share of sliding-window layers stops growing at their window.
    """

    def __init__(self, model: PreTrainedModel):
        stream = Stream(model)
        sizes = []
        for _ in range(2):
            stream.advance(torch.zeros(1, 8, dtype=torch.long, device=model.device))
            sizes.append(stream.state_bytes())
        self.per_token = (sizes[1] - sizes[0]) // 8
        self.fixed = sizes[0] - 8 * self.per_token
        kinds = list(getattr(model.config, "layer_types", None) or [])
        sliding, full = kinds.count("sliding_attention"), kinds.count("full_attention")
        self.sliding = self.per_token * sliding // max(1, sliding + full)  # bytes a token
        self.span = getattr(model.config, "sliding_window", None) or 0

    def at(self, context: int) -> int:
        whole = self.fixed + self.per_token * context
        return whole - self.sliding * max(0, context - self.span) if self.sliding else whole


@dataclass
class Column:
    """One model to measure. `positions` are the tokens that it was trained to read; None: no bound is known."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    positions: int | None = None
    budget: StateSize | None = field(default=None, repr=False)  # of the student; the window column only

    def window(self, context: int) -> int | None:
        """Window of the window column when the student's state is that of `context` tokens; None for other columns."""
        if self.budget is None:
            return None
        return window_for_bytes(self.model.config, self.budget.at(context), self.model.dtype)

    def settings(self, context: int) -> dict[str, int]:
        """What tells measurements of this column apart besides the model: nothing, or window and sinks."""
        window = self.window(context)
        return {} if window is None else {"kv_window": window, "sinks": SINKS}

    @contextmanager
    def at(self, context: int) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """The model as this column sees it, in inference mode."""
        window = self.window(context)
        if window is None:
            yield self.model, self.tokenizer
        else:
            with window_attention(self.model, window):
                yield self.model, self.tokenizer

    def reaches(self, context: int) -> int:
        """Tokens of a text that long for which this column means something."""
        window = self.window(context)
        if window is None:
            return context
        with window_attention(self.model, window) as spec:
            limit = spec.max_context(self.model.config.max_position_embeddings)
        return context if limit is None else min(context, limit)


@dataclass
class Opened:
    """The columns, and what results.json says of the teacher."""

    columns: list[Column]
    student: Column
    teacher: dict[str, Any] | None

    @cached_property
    def state(self) -> StateSize:
        return StateSize(self.student.model)


def open_columns(
    student_dir: Path,
    teacher: str | Path | TeacherRef | None,
    names: tuple[str, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Opened:
    """Loads what the columns need: the student always, the teacher if it is given.

    Args:
        trust_remote_code: run modelling code that lies in `student_dir`. A teacher's is never run: its family is known.

    Raises:
        RnnzooError: unknown column, no model in the folder, or what `resolve_teacher` raises.
    """
    unknown = set(names) - set(COLUMNS)
    if unknown:
        raise RnnzooError(f"Unknown column {', '.join(sorted(unknown))}: expected some of {', '.join(COLUMNS)}.")
    student = _student(student_dir, dtype, device, trust_remote_code)
    opened = Opened([student] if "student" in names else [], student, None)
    if teacher is None:
        return opened
    ref = teacher if isinstance(teacher, TeacherRef) else resolve_teacher(str(teacher))
    opened.teacher = ref.record()
    if not {"teacher", "window"} & set(names):
        return opened
    model = ref.load(dtype=dtype).to(device).eval()
    tokenizer, positions = ref.tokenizer(), ref.config.max_position_embeddings
    if "teacher" in names:
        opened.columns.append(Column("teacher", model, tokenizer, ref.sha, positions))
    if "window" in names:
        opened.columns.append(Column("window", model, tokenizer, ref.sha, budget=opened.state))
    return opened


def _student(folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Column:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    register_auto_classes()
    if not (folder / "config.json").exists():
        raise RnnzooError(f"{folder} holds no model (no config.json): give the output folder of a conversion.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        model = model.to(device).eval()
    except ValueError as error:
        if refusal := foreign_code(folder, error):
            raise refusal from error
        raise RnnzooError(f"The model in {folder} cannot be loaded: {first_line(error)}") from error
    except Exception as error:  # damaged weights, configuration or tokenizer: each library has its own errors
        reason = " ".join(str(error).split())[:200]
        raise RnnzooError(f"The model in {folder} cannot be loaded ({type(error).__name__}: {reason}).") from error
    return Column("student", model, tokenizer, folder_sha256(folder))
