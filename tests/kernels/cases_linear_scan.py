"""The linear scan, as the shared tests call it."""

from __future__ import annotations

import torch

from rnnzoo.kernels.linear_scan import linear_scan

from .recurrences import Recurrence, Shape


def make(shape: Shape, variant: str) -> dict[str, torch.Tensor]:
    dtype = torch.complex128 if variant == "complex" else torch.float64
    channels = shape.heads * shape.width
    size = torch.rand(shape.batch, shape.time, channels, dtype=torch.float64)
    sign = torch.randn(shape.batch, shape.time, channels, dtype=dtype)
    return {
        "a": size * sign / sign.abs(),
        "x": torch.randn(shape.batch, shape.time, channels, dtype=dtype),
        "initial_state": torch.randn(shape.batch, channels, dtype=dtype),
    }


def decayed(inputs: dict[str, torch.Tensor], log: float) -> dict[str, torch.Tensor]:
    return inputs | {"a": torch.full_like(inputs["a"], log).exp()}


RECURRENCES = [
    Recurrence("linear_scan", linear_scan, make, frozenset({"a", "x"}), variants=("real", "complex"), decayed=decayed)
]
