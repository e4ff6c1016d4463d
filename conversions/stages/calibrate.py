"""Calibration in closed form, on a few sequences of text: windows, features, and the parts that every student has."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.errors import RnnzooError
from ...zoo.core.registry import mixer_class
from .closed_form import ClosedForm, fit_layers, has_decay
from .features import fit_features
from .observe import token_weights
from .spend import with_state

if TYPE_CHECKING:
    from ..data import PackedTokens
    from ..job import Job, Part
    from ..recipes.stages import Calibrate

__all__ = ["check_parts", "run"]


def run(job: Job, stage: Calibrate, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """Windows for all converted layers; all else for those converted since the last calibration."""
    started = time.monotonic()
    parts = stage.chosen(job.recipe)
    data = job.packed("calibration", job.recipe.calibration_tokens)
    record: dict[str, Any] = {"parts": parts}
    if "windows" in parts:
        student, record["allocation"] = with_state(job, stage, student, data, part)
    if "features" in parts:
        fit_features(student, job.twin, data, job.seed, part.fresh)
    if left := [name for name in parts if name not in ("windows", "features")]:
        weights = gradient_weights(job, data, part) if stage.weighting == "gradient" else None
        how = ClosedForm(left, stage.ridge, stage.correct, stage.weighting)
        report = lambda done, total: job.progress(part.name, done, total, {})  # noqa: E731
        bf16 = job.dtype == torch.bfloat16
        layers = fit_layers(student.eval(), job.twin, data, how, part.fresh, weights, bf16, report)
        errors = [sum(layer[name] for layer in layers) / max(1, len(layers)) for name in ("before", "after")]
        record |= {"error_before": errors[0], "error_after": errors[1]}
    return student, {"tokens": data.num_tokens, "seconds": round(time.monotonic() - started, 1)} | record


def gradient_weights(job: Job, data: PackedTokens, part: Part) -> torch.Tensor:
    """(layers, N, T), with a mean of 1 in every layer."""
    rows = []
    for number in range(len(data)):
        row = data[number]
        documents = row["seq_ids"] if len(row["seq_ids"].unique()) > 1 else None
        rows.append(token_weights(job.twin, row["input_ids"], documents, job.seed + number))
        job.progress(part.name, (number + 1) * data.seq_len, data.num_tokens, {})
    weights = torch.stack(rows, 1)
    return weights / weights.mean((1, 2), keepdim=True)


def check_parts(stage: Calibrate, student: str) -> None:
    """Refuses a decay that a recipe asks for by name where the student has none to set; by default it is passed over.

    Raises:
        RnnzooError: says so.
    """
    if "decay" in stage.parts and not has_decay(mixer_class(student)):
        raise RnnzooError(f"{student} layers have no decay to set; leave the part decay out.")
