"""The block scan, as the shared tests call it."""

from __future__ import annotations

import torch

from rnnzoo.kernels.block_scan import block_scan

from .recurrences import Recurrence, Shape

WIDTHS = {"blocks of 6": 6, "blocks of 17": 17}


def make(shape: Shape, variant: str) -> dict[str, torch.Tensor]:
    """`shape.width` numbers in blocks; rotations, somewhat shrunk, keep the products of thousands of them bounded."""
    width = min(WIDTHS[variant], shape.width)
    blocks = shape.heads * max(1, shape.width // width // 3)
    random = torch.randn(shape.batch, shape.time, blocks, width, width, dtype=torch.float64)
    size = 0.5 + 0.5 * torch.rand(shape.batch, shape.time, blocks, 1, 1, dtype=torch.float64)
    return {
        "a": size * torch.linalg.qr(random).Q,
        "x": torch.randn(shape.batch, shape.time, blocks, width, dtype=torch.float64),
        "initial_state": torch.randn(shape.batch, blocks, width, dtype=torch.float64),
    }


def decayed(inputs: dict[str, torch.Tensor], log: float) -> dict[str, torch.Tensor]:
    identity = torch.eye(inputs["a"].shape[-1], dtype=torch.float64).expand_as(inputs["a"])
    return inputs | {"a": torch.tensor(log, dtype=torch.float64).exp() * identity}


RECURRENCES = [
    Recurrence("block_scan", block_scan, make, frozenset({"a", "x"}), variants=tuple(WIDTHS), decayed=decayed)
]
