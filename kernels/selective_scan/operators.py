"""What the custom operators of the C and the Triton backend share: both take and return the same tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_gradients(x, dt, a, b, c, d, codes, kept, dy, dstate) -> tuple[Tensor, ...]:
    """Of x, dt, a, b, c, d (nothing without one) and the initial state."""
    d = a.new_empty(0) if d is None else d
    like = torch.contiguous_format
    return tuple(torch.empty_like(tensor, memory_format=like) for tensor in (x, dt, a, b, c, d, dstate))
