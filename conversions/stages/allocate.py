"""The windows of a trained student, measured and chosen again; see `trained_errors.py` and `allocation.py`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from ..fit.spend import reallocated_config
from ..fit.trained_errors import measure_trained
from ..student import build_student, continue_from

if TYPE_CHECKING:
    from ..job import Job, Part
    from ..recipes.stages import Allocate

__all__ = ["run"]


def run(job: Job, stage: Allocate, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """Other windows in as many bytes, the same weights."""
    started = time.monotonic()
    data = job.packed("calibration", job.recipe.calibration_tokens)
    report = lambda done, total: job.progress(part.name, done, total, {})  # noqa: E731
    measured = measure_trained(job.twin, student.eval(), data, job.seed, report)
    config, record = reallocated_config(job.teacher, job.recipe, student.config, measured, job.dtype)
    moved = build_student(job.teacher, job.model, config, job.recipe.student, torch.float32, job.seed)
    continue_from(moved, student)
    return moved, {
        "tokens": data.num_tokens,
        "seconds": round(time.monotonic() - started, 1),
        "allocation": record,
    }
