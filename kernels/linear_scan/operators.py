"""What the custom operators of the C and the Triton backend share: both take and return the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def register_autograd(forward: Any, backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Makes `backward` the gradient of `forward` (a, x, initial, codes, keep) -> (h, state, kept)."""

    def remember(ctx, inputs, output):
        a, x, initial, codes, _ = inputs
        ctx.save_for_backward(a, x, codes, output[2])
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.mark_non_differentiable(output[2])

    def gradients(ctx, dh, dstate, _):
        da, dx, dinitial = backward(*ctx.saved_tensors, dh, dstate)
        return da, dx, None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype), None, None

    forward.register_autograd(gradients, setup_context=remember)
