"""The long convolution, as the shared tests call it: heads * width channels with a few state numbers each."""

from __future__ import annotations

import torch

from rnnzoo.kernels.long_conv import long_conv

from .recurrences import Recurrence, Shape

VARIANTS = ("diagonal", "real diagonal", "dense", "two outputs", "low rank")
STATES = 4


def make(shape: Shape, variant: str) -> dict[str, torch.Tensor]:
    channels, real = shape.heads * shape.width, variant in ("dense", "real diagonal")
    dtype = torch.float64 if real else torch.complex128
    sizes = (channels, STATES)
    a = torch.randn(*sizes, dtype=dtype)
    a = 0.98 * torch.rand(sizes, dtype=torch.float64) ** 0.2 * a / a.abs()
    inputs = {
        "u": torch.randn(shape.batch, shape.time, channels, dtype=torch.float64),
        "a": a,
        "b": torch.randn(sizes, dtype=dtype),
        "c": torch.randn(sizes, dtype=dtype),
        "d": torch.randn(channels, dtype=torch.float64),
        "initial_state": torch.randn(shape.batch, *sizes, dtype=dtype),
    }
    if variant == "dense":
        basis = torch.linalg.qr(torch.randn(channels, STATES, STATES, dtype=dtype))[0]
        other = torch.linalg.qr(torch.randn(channels, STATES, STATES, dtype=dtype))[0]
        inputs["a"] = basis * a[:, None] @ other
    if variant == "two outputs":
        inputs["c"] = torch.randn(channels, 2, STATES, dtype=dtype)
        inputs.pop("d")
    if variant == "low rank":
        inputs["a"] = 0.7 * a
        p = torch.randn(channels, STATES, 2, dtype=dtype)
        inputs["p"] = 0.25 * p / torch.linalg.matrix_norm(p, keepdim=True)
        inputs["q"] = p.mT.conj().resolve_conj() / torch.linalg.matrix_norm(p, keepdim=True)
    return inputs


RECURRENCES = [Recurrence("long_conv", long_conv, make, frozenset({"u"}), variants=VARIANTS)]
