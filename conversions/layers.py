"""Teacher and student layer by layer: two blocks side by side, whether their models are in memory or on disk.

A stage that works so goes through the layers in order, `pair` by `pair`, and `keep`s each; or it trains the `groups`
that it is given. Nothing in it depends on where the models are: here they are in memory, and `mapped_layers.py` has the
same for models on disk, one layer in memory at a time.

N rows of T tokens, D hidden_size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..zoo.core.heads import RecurrentForCausalLM
from ..zoo.core.model import RecurrentBlock
from ..zoo.core.registry import ATTENTION_TYPES
from .context import StageContext, StageRun
from .data import PackedTokens
from .fit.closed_form import Stream

__all__ = ["Group", "InMemoryLayers", "Layers", "Streams", "StudentOnDisk", "open_layers"]

Streams = dict[str, list[Stream]]


@dataclass
class Group:
    """Layers that are trained together.

    Attributes:
        student, teacher: of models on disk what training needs of one layer, under its own name.
        rows: of text; of models on disk with the teacher's `hidden` states (T, D) before the layer.
        folder: for checkpoints. number, count: its place among the groups of the stage.
        report: of the training, which whoever trains puts here.
    """

    student: Any
    teacher: Any
    rows: Any
    folder: Path
    number: int = 0
    count: int = 1
    report: dict[str, Any] = field(default_factory=dict)


class Layers:
    """What a stage is given to work layer by layer.

    Attributes:
        student_model, teacher_model: on disk they have contexts, and what `streams` and `head` give them for a
            while. student: what the stage hands on to the next one.
        first: the layer to begin with: those before it were kept when this run was stopped.
    """

    student_model: RecurrentForCausalLM
    teacher_model: RecurrentForCausalLM
    student: Any
    first: int = 0

    @property
    def device(self) -> torch.device:
        """Where streams and blocks are."""
        return torch.device("cpu")

    @property
    def count(self) -> int:
        return self.student_model.config.num_hidden_layers

    def converted(self, number: int) -> bool:
        return self.student_model.config.layer_types[number] not in ATTENTION_TYPES

    def streams(self, rows: dict[str, tuple[bool, list[dict[str, Tensor]]]]) -> Streams:
        """Rows of text on their way through the models, before the layer `first`.

        Args:
            rows: by name, whether the teacher reads them, and the rows, each with input_ids and seq_ids, (T,).
        """
        raise NotImplementedError

    def pair(self, number: int) -> contextlib.AbstractContextManager[tuple[RecurrentBlock, RecurrentBlock]]:
        """The blocks of teacher and student; the student's mixer may be changed in place."""
        raise NotImplementedError

    def set_aside(self, number: int, block: RecurrentBlock) -> None:
        """Remembers the student's mixer as it is now, for `take_back`."""
        raise NotImplementedError

    def keep(self, number: int, block: RecurrentBlock, report: dict[str, Any] | None, streams: Streams) -> None:
        """Ends the work on a layer, with what there is to say of it, and the streams behind it."""
        raise NotImplementedError

    def reports(self) -> list[dict[str, Any]]:
        """Those of all layers of which there was something to say, in order."""
        raise NotImplementedError

    def take_back(self) -> None:
        """All mixers as they were set aside."""
        raise NotImplementedError

    def head(self) -> contextlib.AbstractContextManager[RecurrentForCausalLM]:
        """The student's final norm and head, as parts of a model."""
        raise NotImplementedError

    def groups(self, rows: PackedTokens) -> Iterator[Group]:
        """What is trained together, one group after the other; training changes mixers of `student_model`."""
        raise NotImplementedError


class StudentOnDisk:
    """A student of which one layer is in memory at a time; see `mapped_layers.py`."""

    def layers(self, stage: str) -> Layers:
        """For a stage of this name."""
        raise NotImplementedError


def open_layers(context: StageContext, student: Any, stage_run: StageRun) -> Layers:
    """Those of a stage's student, and of the teacher."""
    if isinstance(student, StudentOnDisk):
        return student.layers(stage_run.name)
    return InMemoryLayers(context.teacher_model, student, context.folder / stage_run.name)


class InMemoryLayers(Layers):
    """Of models that are whole in memory.

    Args:
        folder: for checkpoints of training.
    """

    def __init__(self, teacher_model: RecurrentForCausalLM, student_model: RecurrentForCausalLM, folder: Path = Path()):
        self.teacher_model, self.folder = teacher_model, folder
        self.student = self.student_model = student_model.eval()
        self._aside: dict[int, dict[str, Tensor]] = {}
        self._reports: list[dict[str, Any]] = []

    @property
    def device(self) -> torch.device:
        return self.student_model.model.embed_tokens.weight.device

    def streams(self, rows: dict[str, tuple[bool, list[dict[str, Tensor]]]]) -> Streams:
        found = {}
        for name, (taught, given) in rows.items():
            found[name] = [Stream.of(self.teacher_model if taught else self.student_model, row) for row in given]
        return found

    @contextlib.contextmanager
    def pair(self, number: int) -> Iterator[tuple[RecurrentBlock, RecurrentBlock]]:
        yield self.teacher_model.model.layers[number], self.student_model.model.layers[number]

    def set_aside(self, number: int, block: RecurrentBlock) -> None:
        self._aside[number] = {name: tensor.clone() for name, tensor in block.mixer.state_dict().items()}

    def keep(self, number: int, block: RecurrentBlock, report: dict[str, Any] | None, streams: Streams) -> None:
        self._reports += [] if report is None else [report]

    def reports(self) -> list[dict[str, Any]]:
        return self._reports

    def take_back(self) -> None:
        for number, tensors in self._aside.items():
            self.student_model.model.layers[number].mixer.load_state_dict(tensors)

    @contextlib.contextmanager
    def head(self) -> Iterator[RecurrentForCausalLM]:
        yield self.student_model

    def groups(self, rows: PackedTokens) -> Iterator[Group]:
        yield (group := Group(self.student_model, self.teacher_model, rows, self.folder))
        self._reports.append(group.report)
