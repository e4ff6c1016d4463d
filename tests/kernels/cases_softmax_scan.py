"""The softmax scan, as the shared tests call it: scores a head or a channel, with and without decay and bonus."""

from __future__ import annotations

from typing import Any

import torch

from rnnzoo.kernels.softmax_scan import SoftmaxState, softmax_scan

from .recurrences import Recurrence, Shape


def make(shape: Shape, variant: str) -> dict[str, Any]:
    batch, time, heads, width = shape.batch, shape.time, shape.heads, shape.width
    scores = 1 if "head" in variant else width

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, dtype=torch.float64)

    inputs: dict[str, Any] = {"k": 2 * randn(batch, time, heads, scores), "v": randn(batch, time, heads, width)}
    if "decay" in variant:
        inputs["decay"] = -torch.rand(heads, scores, dtype=torch.float64)
    if "bonus" in variant:
        inputs["bonus"] = randn(heads, scores)
    denominator = 1 + torch.rand(batch, heads, scores, dtype=torch.float64)
    inputs["initial_state"] = SoftmaxState(randn(batch, heads, scores), randn(batch, heads, width), denominator)
    return inputs


def decayed(inputs: dict[str, Any], log: float) -> dict[str, Any]:
    return inputs | {"decay": torch.full_like(inputs["k"][0, 0], log)}


RECURRENCES = [
    Recurrence(
        "softmax_scan",
        softmax_scan,
        make,
        frozenset({"k", "v"}),
        variants=("head", "head decay", "channel decay bonus"),
        decayed=decayed,
    )
]
