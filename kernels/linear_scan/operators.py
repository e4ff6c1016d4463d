"""What the custom operators of the C and the Triton backend share: both take and return the same tensors."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32  # steps between kept states, as in cpu.c


def empty_outputs(a, x, initial, codes, keep) -> tuple[Tensor, Tensor, Tensor]:
    """h, the last state, and the states before each chunk (none unless `keep`)."""
    batch, time, channels = x.shape
    dtype = torch.complex64 if x.is_complex() else torch.float32
    chunks = -(-time // CHUNK) if keep else 0
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(batch, channels, dtype=dtype),
        x.new_empty(batch, chunks, channels, dtype=dtype),
    )


def empty_gradients(a, x, codes, kept, dh, dstate) -> tuple[Tensor, Tensor, Tensor]:
    """Of a, x and the initial state."""
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(a, memory_format=contiguous),
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(dstate, memory_format=contiguous),
    )
