"""The short convolution, as the shared tests call it."""

from __future__ import annotations

from typing import Any

import torch

from rnnzoo.kernels.short_conv import short_conv

from .recurrences import Recurrence, Shape


def make(shape: Shape, variant: str) -> dict[str, torch.Tensor]:
    channels, taps = shape.heads * shape.width, 3 if variant == "three taps" else 4
    inputs = {
        "x": torch.randn(shape.batch, shape.time, channels, dtype=torch.float64),
        "weight": torch.randn(channels, taps, dtype=torch.float64),
        "bias": torch.randn(channels, dtype=torch.float64),
        "initial_state": torch.randn(shape.batch, channels, taps - 1, dtype=torch.float64),
    }
    if variant == "three taps":
        inputs.pop("bias")
    return inputs


def options(variant: str) -> dict[str, Any]:
    return {"activation": "silu" if variant == "silu" else None}


RECURRENCES = [
    Recurrence(
        "short_conv",
        short_conv,
        make,
        frozenset({"x"}),
        variants=("silu", "linear", "three taps"),
        options=options,
        keeps_state_dtype=True,
    )
]
