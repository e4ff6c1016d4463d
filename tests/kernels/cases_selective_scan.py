"""The selective scan, as the shared tests call it: heads * width channels with 16 state numbers each, or 1, or 24."""

from __future__ import annotations

import torch

from rnnzoo.kernels.selective_scan import selective_scan

from .recurrences import Recurrence, Shape

STATES = {"16 states": 16, "1 state": 1, "24 states without D": 24}


def make(shape: Shape, variant: str) -> dict[str, torch.Tensor]:
    channels, states = shape.heads * shape.width, STATES[variant]
    rows = shape.batch, shape.time
    inputs = {
        "x": torch.randn(*rows, channels, dtype=torch.float64),
        "dt": torch.rand(*rows, channels, dtype=torch.float64),
        "a": -4 * torch.rand(channels, states, dtype=torch.float64),
        "b": torch.randn(*rows, states, dtype=torch.float64),
        "c": torch.randn(*rows, states, dtype=torch.float64),
        "d": torch.randn(channels, dtype=torch.float64),
        "initial_state": torch.randn(shape.batch, channels, states, dtype=torch.float64),
    }
    if variant.endswith("without D"):
        inputs.pop("d")
    return inputs


def decayed(inputs: dict[str, torch.Tensor], log: float) -> dict[str, torch.Tensor]:
    return inputs | {"dt": torch.ones_like(inputs["dt"]), "a": torch.full_like(inputs["a"], log)}


RECURRENCES = [
    Recurrence(
        "selective_scan",
        selective_scan,
        make,
        frozenset({"x", "dt", "b", "c"}),
        variants=tuple(STATES),
        decayed=decayed,
        small=(24, 2),
    )
]
