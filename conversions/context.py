"""What the stages of a conversion are given: the teacher, the text in rows, seed and dtype, and the run's folder."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .data import PackedTokens, TextHashes, default_corpus, open_corpus, pack
from .memory import return_freed_memory
from .precision import compute_dtype
from .processes import Processes
from .recipes import Recipe
from .run_folder import write_json
from .student import build_student, continue_from, layer_types, student_config, zoo_teacher
from .teachers import TeacherRef

__all__ = ["Progress", "StageContext", "StageRun"]

EVALUATION_CHARACTERS = 400_000
Progress = Callable[[str, int, int, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class StageRun:
    """What one stage of a run is given.

    Attributes:
        name: of the stage within the run, also of its folder. rows: of the training text that are its own.
        fresh: layers converted since the stage ran before, in a recipe that converts step by step.
    """

    name: str
    rows: range
    fresh: list[int]


class StageContext:
    """One conversion, as its stages see it. Heavy things (teacher, data) are made when a stage first needs them.

    Attributes:
        folder: of the run, for what has to outlive a stop: `folder / stage_run.name` is the stage's own.
        data, text_field: as `open_corpus` takes them; data None: the default text.
        chat_data: sources of chats and preferences, for stages that name none.
        dtype: of the saved weights. compute_dtype: bfloat16 says that stages compute under autocast.
        checkpointing: of activations, in stages that train. processes: those that work on this conversion.
        progress: called as progress(what, done, all, info).
    """

    def __init__(
        self,
        folder: Path,
        teacher: TeacherRef,
        recipe: Recipe,
        *,
        data: list[str] | None = None,
        text_field: str = "text",
        chat_data: list[str] | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        checkpointing: bool = False,
        progress: Progress | None = None,
    ):
        self.folder, self.teacher, self.recipe = folder, teacher, recipe
        self.data, self.text_field, self.chat_data = data, text_field, chat_data
        self.seed, self.dtype, self.checkpointing = seed, dtype, checkpointing
        self.progress: Progress = progress or (lambda *_: None)
        self.processes = Processes()

    @property
    def compute_dtype(self) -> torch.dtype:
        """`dtype`, or float32 where bfloat16 is slow: it may differ between the machines of one run."""
        return compute_dtype(self.dtype)

    @property
    def bf16(self) -> bool:
        """Whether stages compute under autocast to bfloat16."""
        return self.compute_dtype == torch.bfloat16

    @functools.cached_property
    def model(self) -> Any:
        """The teacher as transformers has it, in float32; see `release_model`."""
        return self.teacher.load(torch.float32)

    @functools.cached_property
    def teacher_model(self) -> Any:
        """The teacher in the zoo's own block, every layer attention, in the dtype to compute in."""
        return zoo_teacher(self.teacher, self.model, self.compute_dtype)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return self.teacher.tokenizer()

    @functools.cached_property
    def generation(self) -> dict[str, Any]:
        """How the student is to generate: as the teacher does."""
        return self.teacher.generation(self.tokenizer)

    @functools.cached_property
    def corpus(self) -> Any:
        if self.data:
            return open_corpus(self.data, self.text_field, tokenizer=self.tokenizer)
        return default_corpus(
            self.tokenizer,
            model=self.teacher.load(self.compute_dtype),
            sampled_tokens=self.recipe.tokens // 2,
            sampled_length=min(self.recipe.seq_len, 1024),
            seed=self.seed,
            record=self.folder / "default_text.json",
            progress=lambda done, total: self.progress("sampled text", done, total, {}),
        )

    @functools.cached_property
    def evaluation_texts(self) -> list[str]:
        """Held out of all training; kept for a restart."""
        path = self.folder / "evaluation_texts.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        texts = self.corpus.beginning("evaluation", EVALUATION_CHARACTERS)
        write_json(path, texts)
        return texts

    def calibration(self) -> PackedTokens:
        """The rows that are read for closed forms and measurements."""
        return self.packed("calibration", self.recipe.calibration_tokens)

    def training(self) -> PackedTokens:
        """The rows of the training text, of which each `StageRun` has its own."""
        return self.packed("training", self.recipe.tokens)

    def packed(self, name: str, tokens: int, length: int | None = None) -> PackedTokens:
        """Rows, made once and kept for a restart: "calibration", or of the training text "training" and other names.

        Args:
            length: tokens of a row, if not the recipe's.
        """
        path = self.folder / "data" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            return PackedTokens.load(path)
        exclude = [TextHashes.of(self.evaluation_texts, "evaluation")]
        if name != "calibration":
            exclude.append(self.calibration().hashes)
        rows = pack(
            self.corpus.documents("calibration" if name == "calibration" else "training", seed=self.seed),
            self.tokenizer,
            length or self.recipe.seq_len,
            tokens,
            name=name,
            source=self.corpus.source,
            exclude=exclude,
            long_documents=True,
            progress=lambda done, total: self.progress(f"{name} text", done, total, {}),
        )
        rows.save(path)
        return rows

    def initialise(self, previous: Any, keep: list[int]) -> Any:
        """A student started from the teacher, the layers `keep` attention, and from what was trained before."""
        types = layer_types(self.teacher, self.recipe, keep)
        return self.rebuilt(student_config(self.teacher, self.recipe, types), previous)

    def rebuilt(self, config: Any, previous: Any) -> Any:
        """A student of this configuration, started from the teacher, and from what `previous` has been trained to."""
        student = build_student(self.teacher, self.model, config, self.recipe.student, torch.float32, self.seed)
        if previous is not None:
            continue_from(student, previous)
        return student

    def release_model(self) -> None:
        """Lets go of `model`, which is in float32 and not needed in training; who asks for it again, loads it again."""
        self.__dict__.pop("model", None)
        return_freed_memory()

    def release_teacher_model(self) -> None:
        """Lets go of `teacher_model`."""
        self.__dict__.pop("teacher_model", None)
