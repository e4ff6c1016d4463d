"""What the custom operators of the fused backends have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["contiguous", "needs_gradient"]


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may come, so that forward must keep what it needs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Each as its rows lie one after the other; None stays."""
    return [None if x is None else x.contiguous() for x in tensors]
