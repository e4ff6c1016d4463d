"""Calibration of Hedgehog layers in closed form, on a few sequences of the attention twin: windows, then features."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from ...zoo.core.registry import ATTENTION_TYPES
from ..student import build_student, continue_from, student_config, window_slots
from .features import fit_features
from .windows import allocate, measure_windows

if TYPE_CHECKING:
    from ..job import Job, Part
    from ..recipes.stages import Calibrate

__all__ = ["run"]


def run(job: Job, stage: Calibrate, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """Windows for all converted layers; features for those converted since the last calibration."""
    started = time.monotonic()
    data = job.packed("calibration", job.recipe.calibration_tokens)
    config = student.config
    converted = [i for i, kind in enumerate(config.layer_types) if kind not in ATTENTION_TYPES]
    if job.recipe.state_budget is not None:
        slots = window_slots(job.teacher, job.recipe, config.layer_types, job.dtype)
        report = lambda done, total: job.progress(part.name, done, total, {})  # noqa: E731
        measured = measure_windows(job.twin, data, config.num_sinks, job.seed, report)
        sizes = allocate(measured, converted, slots)
        config = student_config(job.teacher, job.recipe, config.layer_types, window_sizes=sizes)
        sized = build_student(job.teacher, job.model, config, job.recipe.student, torch.float32, job.seed)
        continue_from(sized, student)
        student = sized
    fit_features(student, job.twin, data, job.seed, part.fresh)
    return student, {"tokens": data.num_tokens, "seconds": round(time.monotonic() - started, 1)}
