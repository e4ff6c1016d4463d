"""Calibration in closed form, on a few sequences of text: windows, features, and the parts that every student has."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.errors import RnnzooError
from ...zoo.core.registry import mixer_class
from ..fit.closed_form import ClosedForm, fit_layers, has_decay
from ..fit.features import fit_features
from ..fit.observe import token_weights
from ..fit.spend import with_state
from ..precision import mixed_precision
from ..recipes.stages import WINDOW_PARTS

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
    if left := [name for name in parts if name not in WINDOW_PARTS]:
        record |= fit_if_better(job, stage, left, student.eval(), data, part)
    return student, {"tokens": data.num_tokens, "seconds": round(time.monotonic() - started, 1)} | record


def fit_if_better(
    job: Job, stage: Calibrate, parts: list[str], student: Any, data: PackedTokens, part: Part
) -> dict[str, Any]:
    """Fits layers in closed form, and takes that back where it makes the student's loss on calibration text larger.

    What layers gain one by one need not be a gain for the model. Of three rows or more the last is for this judgement
    alone.

    Returns:
        Mean errors of the layers and losses per token, before and after, whether the fit was `kept` and, where values
        were to be refitted, in how many layers they are.
    """
    bf16 = job.dtype == torch.bfloat16
    fitted, judged = data, data
    if len(data) >= 3:
        fitted, judged = data.rows(0, len(data) - 1), data.rows(len(data) - 1, 1)
    mixers = {name: tensor.clone() for name, tensor in student.state_dict().items() if ".mixer." in name}
    losses = [loss_on(student, judged, bf16)]
    weights = gradient_weights(job, fitted, part) if stage.weighting == "gradient" else None
    how = ClosedForm(parts, stage.ridge, stage.correct, stage.weighting)
    report = lambda done, total: job.progress(part.name, done, total, {})  # noqa: E731
    layers = fit_layers(student, job.twin, fitted, how, part.fresh, weights, bf16, report)
    losses.append(loss_on(student, judged, bf16))
    kept = losses[1] <= losses[0]
    if not kept:
        student.load_state_dict(mixers, strict=False)
    errors = [sum(layer[name] for layer in layers) / max(1, len(layers)) for name in ("before", "after")]
    found = [value if math.isfinite(value) else None for value in errors + losses]
    names = ("error_before", "error_after", "loss_before", "loss_after")
    record = dict(zip(names, found, strict=True)) | {"fits_kept": kept}
    return record | ({"values_refitted": sum(layer["values"] for layer in layers)} if "values" in parts else {})


@torch.no_grad()
def loss_on(student: Any, data: PackedTokens, bf16: bool) -> float:
    """Mean cross-entropy per token, in nats; infinite where it is not a number."""
    from ..evaluation.scoring import token_log_probs

    device = student.model.embed_tokens.weight.device
    total, count = 0.0, 0
    with mixed_precision(device, bf16):
        for i in range(len(data)):
            ids, seq_ids = (data[i][name].to(device) for name in ("input_ids", "seq_ids"))
            documents = None if bool((seq_ids == seq_ids[0]).all()) else seq_ids[None]
            hidden = student.model(ids[None], seq_ids=documents, use_cache=False).last_hidden_state[0]
            within = seq_ids[1:] == seq_ids[:-1]
            total -= float(token_log_probs(student, hidden[:-1][within], ids[1:][within]).double().sum())
            count += int(within.sum())
    loss = total / max(1, count)
    return loss if math.isfinite(loss) else math.inf


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
