"""Stages of a conversion: a module for each kind, with the one function `run`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..job import Job, Part
    from ..recipes.stages import Stage

__all__ = ["run_stage"]


def run_stage(job: Job, stage: Stage, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """The student after a stage (in float32), and what run.json and results.json record of it.

    A stage that trains returns `tokens`, `seconds`, `loss_first`, `loss_last`; the others at least `tokens` (read, not
    trained on) and `seconds`. A stage may change the student given or return another one.
    """
    return importlib.import_module(f".{stage.kind}", __name__).run(job, stage, student, part)
