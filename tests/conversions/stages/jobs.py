"""What one stage is given: a tiny teacher, random rows, and a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rnnzoo.conversions.context import StageContext, StageRun
from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.student import build_student, layer_types, student_config
from rnnzoo.conversions.teachers import resolve_teacher

from ..tiny import tiny_teacher

LENGTH = 32
HEDGEHOG = {"feature_map": "prototype", "feature_width": 4, "window_size": 4}


def resolved(folder: Path, **changes: Any) -> tuple[Any, Any]:
    """A tiny Llama: (its reference, its model)."""
    ref = resolve_teacher(str(tiny_teacher("llama", folder, **changes)))
    return ref, ref.load()


def student_of(teacher, mixer: str = "hedgehog", keep=(), **options):
    ref, model = teacher
    recipe = Recipe("test", mixer, [], student_options=options or (HEDGEHOG if mixer == "hedgehog" else {}))
    config = student_config(ref, recipe, layer_types(ref, recipe, list(keep)))
    return build_student(ref, model, config, mixer, torch.float32, 0)


def random_rows(count: int, length: int = LENGTH, documents: int = 1) -> PackedTokens:
    ids = torch.randint(3, 310, (count, length), generator=torch.Generator().manual_seed(0))
    seq_ids = torch.arange(length) * documents // length
    return PackedTokens(ids, seq_ids.expand_as(ids), "test", TextHashes("test"))


class OneStage(StageContext):
    """Runs one stage; `callback` is its progress, and may stop it."""

    def __init__(self, teacher, folder: Path, *, rows: PackedTokens, per_step: int = 2, callback=None, **recipe: Any):
        ref, self.model = teacher
        self.rows = rows
        chosen = Recipe("test", "hedgehog", [], seq_len=rows.seq_len, batch_tokens=per_step * rows.seq_len, **recipe)
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, ref, chosen, dtype=torch.float32, progress=callback)

    def packed(self, name: str, tokens: int, length: int | None = None) -> PackedTokens:
        return self.rows

    def do(self, stage, student) -> dict[str, Any]:
        """Runs the stage on all rows; the student changes in place."""
        after, report = stage.run(self, student, StageRun(stage.name, range(len(self.rows)), []))
        assert after is student
        return report


def weights(student) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def changed(before: dict, student) -> set[str]:
    now = student.state_dict()
    assert set(now) == set(before)
    return {name for name, tensor in now.items() if not torch.equal(before[name], tensor)}


class Stop(Exception):
    pass


def stop_at(tokens: int):
    """A progress function that ends the stage once it has trained on so many tokens."""

    def callback(stage, done, total, info):
        if done >= tokens and info:
            raise Stop

    return callback
