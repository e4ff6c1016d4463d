"""Softmax over window and sinks. Stands for `kernels/gated_linear_attention/softmax_part.py`, which keeps less memory.

Queries in blocks of C steps see C + length - 1 keys, of which a bias takes out what is not in their windows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.gated_linear_attention.state import Window, WindowState, ring_offsets, state_dtype

BLOCK = 64


def softmax_part(
    window: Window, v: Tensor, state: WindowState | None, starts: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Average y (B, T, H, V), lse (B, T, H) and, with anchor "max", the largest score (B, T, H), else None.

    v: (B, T, Hk, V). starts: (B, T) step at which each step's document began; None: 0.
    """
    parts = [_head(window, v[:, :, head], state, starts, head) for head in range(v.shape[2])]
    y, lse, largest = (torch.stack(each, 2).flatten(2, 3) for each in zip(*parts, strict=True))
    return y, lse, largest if window.anchor == "max" else None


def _head(window: Window, v: Tensor, state: WindowState | None, starts: Tensor | None, head: int) -> tuple[Tensor, ...]:
    """Of one kv head and its group of G query heads: y (B, T, G, V), lse and largest (B, T, G)."""
    (batch, time), length, device = v.shape[:2], window.lengths[head], v.device
    group = window.q.shape[2] // len(window.lengths)
    own = slice(head * group, (head + 1) * group)
    k, q, dtype = window.k[:, :, head], window.q[:, :, own], state_dtype(v.dtype)
    scale = k.shape[-1] ** -0.5 if window.scale is None else window.scale
    size = min(BLOCK, time)
    blocks = -(-time // size)
    starts = torch.zeros(batch, time, dtype=torch.int64, device=device) if starts is None else starts

    def tiles(x: Tensor, ring: Tensor | None) -> Tensor:
        """Keys or values (B, T, n) as each block sees them: (B, blocks, n, size + length - 1)."""
        past = x.new_zeros(batch, length, x.shape[-1])
        if ring is not None and state is not None:
            rows = torch.remainder(state.count[:, None] + torch.arange(-length, 0, device=device), length)
            past = ring[torch.arange(batch, device=device)[:, None], ring_offsets(window.lengths)[head] + rows]
        x = F.pad(torch.cat([past[:, 1:].to(x.dtype), x], 1), (0, 0, 0, blocks * size - time))
        return x.unfold(1, size + length - 1, size)

    def in_blocks(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, blocks * size - time)).unflatten(1, (blocks, size))

    step = torch.arange(blocks * size, device=device).view(blocks, size, 1)
    key = step[:, :1] - (length - 1) + torch.arange(size + length - 1, device=device)
    first = in_blocks(starts)[..., None] + window.sinks
    seen = (key <= step) & (step - key < length) & (key >= first)
    scores = torch.einsum("bnsgd,bndw->bnsgw", in_blocks(q), tiles(k, state and state.ring_k)).to(dtype) * scale
    scores = scores.masked_fill(~seen[:, :, :, None], torch.finfo(dtype).min).flatten(1, 2)[:, :time]

    sink_step = starts[..., None] + torch.arange(window.sinks, device=device)
    far_q = q if window.q_sink is None else window.q_sink[:, :, own]
    far_k, far_v = (_sinks(x, sink_step, None if ring is None else ring[:, head]) for x, ring in _pairs(k, v, state))
    far = torch.einsum("btgd,btsd->btgs", far_q, far_k).to(dtype) * scale
    unseen = sink_step > torch.arange(time, device=device)[:, None]
    far = far.masked_fill(unseen[:, :, None], torch.finfo(dtype).min)

    every = torch.cat([far, scores], -1)
    lse, largest = every.logsumexp(-1), every.amax(-1)
    far, near = (every - lse[..., None]).exp().to(v.dtype).split([window.sinks, scores.shape[-1]], -1)
    y = torch.einsum("bnsgw,bnvw->bnsgv", in_blocks(near), tiles(v, state and state.ring_v)).flatten(1, 2)[:, :time]
    return (y + torch.einsum("btgs,btsv->btgv", far, far_v)).to(dtype), lse, largest


def _pairs(k: Tensor, v: Tensor, state: WindowState | None) -> list[tuple[Tensor, Tensor | None]]:
    return [(k, state and state.sink_k), (v, state and state.sink_v)]


def _sinks(x: Tensor, steps: Tensor, old: Tensor | None) -> Tensor:
    """What x (B, T, n) is at the steps (B, T, sinks); at those before the call, what the state's sinks are."""
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    taken = x[rows, steps.clamp(0, x.shape[1] - 1)]
    return taken if old is None else torch.where((steps < 0)[..., None], old[:, None].to(x.dtype), taken)
