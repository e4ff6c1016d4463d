"""`window_step` by `gated_linear_attention` on unpacked rings, in plain torch; runs in float64 and on any device.

It is the backends "chunked" and "reference" at once: which of the two runs is `gated_linear_attention`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_floating_point import rounded_like, stored_like, unpacked
from ..gated_linear_attention import Window, WindowState, gated_linear_attention, ring_slots
from ..rows import parts
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
    backend: str = "chunked",
) -> Tensor:
    """See `kernels.window_step`."""
    dtype = state.s.dtype
    k, v = rounded_like(k, state.ring_k), rounded_like(v, state.ring_v)
    q, near, new_k, new_v = (x[:, None].to(dtype) for x in (q, near, k, v))
    far = None if far is None else far[:, None].to(dtype)
    features = q.new_zeros(*new_k.shape[:3], q.shape[-1])  # of the new token: they count when it leaves the window
    rings = (unpacked(ring, dtype) for ring in (state.ring_k, state.ring_v, state.sink_k, state.sink_v))
    window = Window(near, new_k, lengths, sinks, far, factor=factor, anchor=anchor, ring_features=leaving)
    before = WindowState(state.s, *rings, state.count)
    o, after = gated_linear_attention(
        q, features, new_v, g, scale=scale, window=window, initial_state=before, backend=backend
    )
    rows = torch.arange(len(state.count), device=state.count.device)[:, None]
    slots = ring_slots(state.count, lengths)
    first = torch.arange(sinks, device=state.count.device) == state.count[:, None]
    first = first[:, None, :, None]  # (B, 1, sinks, 1), without reading it: that would wait for the device
    for ring, sink_ring, x in ((state.ring_k, state.sink_k, k), (state.ring_v, state.sink_v, v)):
        for stored, sunk, new in zip(parts(ring), parts(sink_ring), parts(stored_like(x, ring)), strict=True):
            stored[rows, slots] = new
            sunk.copy_(torch.where(first, new[:, :, None], sunk))
    assert isinstance(after, WindowState)
    state.s.copy_(after.s)
    state.count.copy_(after.count)
    return o[:, 0]


@torch.no_grad()
def leaving_keys(*, state: State, lengths: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """See `kernels.window_step`."""
    slots = ring_slots(state.count, lengths)
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    ring = state.ring_k
    return ring[rows, slots].to(dtype) if isinstance(ring, Tensor) else ring.select(rows, slots).unpack(dtype)
