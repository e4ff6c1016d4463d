"""What the custom operators of the fused backends have in common."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "contiguous", "needs_gradient"]

NAMESPACE = "rnnzoo"
if __package__ != "rnnzoo.kernels":
    # A published model brings these modules along in a package of its own; torch has one table of operators a process.
    NAMESPACE += "_" + hashlib.sha256(str(__package__).encode()).hexdigest()[:16]


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may come, so that forward must keep what it needs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Each as its rows lie one after the other; None stays."""
    return [None if x is None else x.contiguous() for x in tensors]
