"""What the fused backends return, as empty tensors: their operators' fakes, and the memory that they fill."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

CHUNK = 32  # steps between kept states, as in cpu.c


def same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in their dtype, or, where they have several, in float32."""
    if len({x.dtype for x in tensors}) == 1:
        return tensors
    return tuple(x.to(torch.float32) for x in tensors)


def empty_outputs(q, k, v, a, b, g, initial, codes, scale, keep) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state, and the states before each chunk (none unless `keep`)."""
    batch, time, heads, values = v.shape
    chunks = -(-time // CHUNK) if keep else 0
    return (
        v.new_empty(batch, time, q.shape[2], values),
        v.new_empty(batch, heads, q.shape[-1], values, dtype=torch.float32),
        v.new_empty(batch, heads, chunks, q.shape[-1], values, dtype=torch.float32),
    )


def empty_gradients(
    q, k, v, a, b, g, codes, kept, d_out, d_state, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v, a, b, g (no element without one) and the initial state."""
    like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    dg = v.new_empty(0, dtype=torch.float32) if g is None else like(g)
    return like(q), like(k), like(v), like(a), like(b), dg, like(d_state)


def remember(ctx, inputs, output) -> None:
    """What backward gets of a call of the forward operator."""
    q, k, v, a, b, g, initial, codes, scale, _ = inputs
    ctx.save_for_backward(q, k, v, a, b, g, codes, output[2])
    ctx.scale, ctx.decays = scale, g is not None
    ctx.initial_dtype = None if initial is None else initial.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # no zeros in place of a gradient of the kept states


def gradients(backward, ctx, d_out, d_state, d_kept) -> tuple[Tensor | None, ...]:
    """The forward operator's gradients, by the backward operator."""
    saved = ctx.saved_tensors  # once: checkpointing allows no more
    q, v = saved[0], saved[2]
    batch, time, heads, values = v.shape
    if d_out is None:
        d_out = v.new_zeros(batch, time, q.shape[2], values)
    if d_state is None:
        d_state = v.new_zeros(batch, heads, q.shape[-1], values, dtype=torch.float32)
    *found, dg, d_initial = backward(*saved, d_out, d_state, ctx.scale)
    dg = dg if ctx.decays else None
    d_initial = None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)
    return *found, dg, d_initial, None, None, None
