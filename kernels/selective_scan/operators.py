"""What the custom operators of the C and the Triton backend share: both take and return the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def empty_gradients(x, dt, a, b, c, d, codes, kept, dy, dstate) -> tuple[Tensor, ...]:
    """Of x, dt, a, b, c, d (nothing without one) and the initial state."""
    d = a.new_empty(0) if d is None else d
    like = torch.contiguous_format
    return tuple(torch.empty_like(tensor, memory_format=like) for tensor in (x, dt, a, b, c, d, dstate))


def register_autograd(forward: Any, backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Makes `backward` the gradient of `forward` (x, dt, a, b, c, d, initial, codes, keep) -> (y, state, kept)."""

    def remember(ctx, inputs, output):
        *tensors, initial, codes, _ = inputs
        ctx.save_for_backward(*tensors, codes, output[2])
        ctx.has_skip, ctx.has_initial = tensors[-1] is not None, initial is not None
        ctx.output_like = output[0].shape, output[0].dtype, output[1].shape
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # no zeros in the shape of the kept states

    def gradients(ctx, dy, dstate, _):
        saved, (shape, dtype, state_shape) = ctx.saved_tensors, ctx.output_like
        kept = saved[-1]
        dy = kept.new_zeros(shape, dtype=dtype) if dy is None else dy
        dstate = kept.new_zeros(state_shape) if dstate is None else dstate
        *found, dd, dinitial = backward(*saved, dy, dstate)
        return *found, dd if ctx.has_skip else None, dinitial if ctx.has_initial else None, None, None

    forward.register_autograd(gradients, setup_context=remember)
