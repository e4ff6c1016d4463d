"""`bounded_step` and `retention` in C (`cpu.c`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import function, pointer
from ..rows import as_float, kind, numbers, pointers
from .state import BoundedState, Bounds

FARTHEST = 2**40  # instead of no reach


@torch.no_grad()
def bounded_step(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    state: BoundedState,
    bounds: Bounds,
    q_sink: Tensor | None,
    scale: float,
) -> Tensor:
    """See `kernels.bounded_step`."""
    batch, heads, key_width = q.shape
    kv_heads, value_width = v.shape[1:]
    o = torch.empty(batch, heads, value_width)
    # Held by name until the call is over: pointers keep nothing alive.
    inputs = [as_float(x) for x in (q, q_sink, k, v, score)]
    function("bounded_attention", "bounded_step", "p" * 15 + "i" * 9 + "fi")(
        *map(pointer, inputs),
        *pointers(state.k),
        *pointers(state.v),
        *map(pointer, (state.score, state.position, state.count)),
        *(pointer(numbers(bounds.rows)), pointer(numbers(bounds.recents)), pointer(o)),
        *(batch, heads, kv_heads, key_width, value_width, bounds.sinks, bounds.reach or FARTHEST),
        *(kind(state.k), kind(state.v), scale, torch.get_num_threads()),
    )
    return o.to(v.dtype)


@torch.no_grad()
def retention(
    *, score: Tensor, position: Tensor, count: Tensor, bounds: Bounds, seq_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `retention` in `chunked.py`."""
    batch, heads, total = score.shape
    most = position.shape[2]
    time = total - most
    begins = tokens = None
    if seq_ids is not None:
        begins = torch.zeros(batch, time, dtype=torch.bool)
        begins[:, 1:] = seq_ids[:, 1:] != seq_ids[:, :-1]
    if mask is not None:
        tokens = mask.contiguous()
    until, positions = (torch.empty(batch, heads, total, dtype=torch.int64) for _ in range(2))
    held = torch.empty(batch, heads, most, dtype=torch.int64)
    inputs = [score.contiguous(), position.to(torch.int64).contiguous(), count.contiguous(), begins, tokens]
    function("bounded_attention", "retention", "p" * 10 + "i" * 7)(
        *map(pointer, inputs),
        *map(pointer, (numbers(bounds.rows), numbers(bounds.recents), until, held, positions)),
        *(batch, heads, most, time, bounds.sinks, bounds.reach or FARTHEST, torch.get_num_threads()),
    )
    return until, held, positions
