"""`window_step` in C (`cpu.c`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import function, pointer
from ..rows import as_float, kind, numbers, pointers
from .state import State


@torch.no_grad()
def window_step(
    *,
    q: Tensor,
    near: Tensor,
    far: Tensor | None,
    k: Tensor,
    v: Tensor,
    leaving: Tensor | None,
    g: Tensor | None,
    factor: Tensor | None,
    state: State,
    lengths: tuple[int, ...],
    sinks: int,
    anchor: str,
    scale: float,
) -> Tensor:
    """See `kernels.window_step`."""
    batch, heads, key_width = near.shape
    kv_heads, value_width = v.shape[1:]
    o = torch.empty(batch, heads, value_width)
    # Held by name until the call is over: pointers keep nothing alive.
    inputs = [as_float(x) for x in (q, near, far, k, v, leaving, g, factor)]
    rings = (state.ring_k, state.ring_v, state.sink_k, state.sink_v)
    function("window_step", "window_step", "p" * 20 + "i" * 10 + "ffi")(
        *map(pointer, inputs),
        pointer(state.s),
        *(address for ring in rings for address in pointers(ring)),
        *(pointer(state.count), pointer(numbers(tuple(lengths))), pointer(o)),
        *(batch, heads, kv_heads, key_width, value_width, q.shape[-1], sinks),
        *(kind(state.ring_k), kind(state.ring_v), int(anchor == "absolute")),
        *(key_width**-0.5, scale, torch.get_num_threads()),
    )
    return o.to(v.dtype)


@torch.no_grad()
def leaving_keys(*, state: State, lengths: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """See `kernels.window_step`."""
    ring = state.ring_k
    batch, width = len(state.count), ring.shape[-1] if isinstance(ring, Tensor) else ring.width
    keys = torch.empty(batch, len(lengths), width)
    function("window_step", "leaving_keys", "p" * 5 + "i" * 4)(
        *pointers(ring),
        *(pointer(state.count), pointer(numbers(tuple(lengths))), pointer(keys)),
        *(batch, len(lengths), width, kind(ring)),
    )
    return keys.to(dtype)
