"""What the custom operators of the C and the Triton backend share: both take and return the same tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..operators import needs_gradient
from ..steps import step_codes

CHUNK = 32  # steps between kept states, as in cpu.c


def fused(
    operator: Callable[..., tuple[Tensor, Tensor, Tensor]],
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`kernels.delta_rule` by a backend's operator: all in one dtype, float32 where they have several."""
    output_dtype = v.dtype
    if not q.dtype == k.dtype == v.dtype == a.dtype == b.dtype:
        q, k, v, a, b = (x.to(torch.float32) for x in (q, k, v, a, b))
    g = None if g is None else g.to(torch.float32)
    inputs = (q, k, v, a, b, g, initial_state)
    o, state, _ = operator(*inputs, step_codes(seq_ids, mask), scale, needs_gradient(*inputs))
    return o.to(output_dtype), state


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
    q, k, v, a, b, g, codes, kept, do, dstate, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v, a, b, g (no element without one) and the initial state."""
    like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    dg = v.new_empty(0, dtype=torch.float32) if g is None else like(g)
    return like(q), like(k), like(v), like(a), like(b), dg, like(dstate)
