"""One token through the window of `gated_linear_attention`, in few calls: at batch 1 each costs more than its work.

All query heads are multiplied with all ring rows at once, and a bias takes out the rows of other heads: that is more
arithmetic than a product for each head, but far fewer calls.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..dtypes import state_dtype
from .linear_part import divide
from .state import LOWEST_SHIFT, Window, WindowState, ring_heads, ring_layout, ring_slots


@lru_cache(maxsize=256)
def _layout(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(R,) each row's place in its ring and the ring's length, (Hk, R) rows of each head."""
    with torch.inference_mode(False):  # the tensors are kept and used again outside of it
        owner = ring_heads(lengths, device)
        periods, offsets = ring_layout(lengths, device)
        places = torch.arange(sum(lengths), device=device) - offsets[owner]
        return places, periods[owner], owner == torch.arange(len(lengths), device=device)[:, None]


def windowed_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    window: Window,
    state: WindowState,
    mask: Tensor | None,
) -> tuple[Tensor, WindowState]:
    """`gated_linear_attention` with a window and T = 1; the given state is left as it was."""
    dtype = state_dtype(v.dtype)
    batch, width = len(q), q.shape[-1]
    kv_heads, key_width = window.k.shape[2:]
    sinks, count = window.sinks, state.count[:, None]
    new_q, new_k, new_v, sink_q = window.q[:, 0], window.k[:, 0], v[:, 0], window.q_sink
    if mask is not None:
        keep = mask[..., None]
        q, k = (torch.where(keep[..., None], x, 0.0) for x in (q, k))
        new_q, new_k, new_v = (torch.where(keep, x, 0.0) for x in (new_q, new_k, new_v))
        sink_q = None if sink_q is None else torch.where(keep[..., None], sink_q, 0.0)
    periods, _ = ring_layout(window.lengths, v.device)
    places, row_periods, owned = _layout(window.lengths, v.device)
    slots = ring_slots(state.count, window.lengths)
    rows = torch.arange(batch, device=v.device)[:, None]

    s = state.s
    if width:
        s = s if g is None else s * g.to(dtype).exp().view(-1, 1, 1)
        if window.ring_features is not None:
            leaves = (count - periods >= sinks)[..., None]
            features = window.ring_features
            if features.shape[1] != kv_heads:
                features = features[rows, slots]
            leaving_k = torch.where(leaves, features.to(dtype), 0.0)
            leaving_v = torch.nn.functional.pad(state.ring_v[rows, slots].to(dtype), (0, 1), value=1.0)
            s = torch.addcmul(s, leaving_k[..., None], leaving_v[..., None, :])

    ring_k = state.ring_k.index_put((rows, slots), new_k)
    ring_v = state.ring_v.index_put((rows, slots), new_v)
    unseen = count - (count - places) % row_periods < sinks  # (B, R): empty rows hold a negative token
    bias = torch.where(owned & ~unseen[:, None], 0.0, -torch.inf)  # (B, Hk, R)
    near = new_q.to(dtype)
    scores = near @ ring_k.to(dtype).transpose(1, 2)
    sink_k, sink_v = state.sink_k, state.sink_v
    if sinks:
        token, _, sinks_owned = _layout((sinks,) * kv_heads, v.device)
        written = (token[:sinks] == count)[:, None, :, None]
        sink_k = torch.where(written, new_k[:, :, None], sink_k)
        sink_v = torch.where(written, new_v[:, :, None], sink_v)
        present = sinks_owned & (token <= count)[:, None]
        bias = torch.cat([torch.where(present, 0.0, -torch.inf), bias], dim=-1)
        far = near if sink_q is None else sink_q[:, 0].to(dtype)
        scores = torch.cat([far @ sink_k.to(dtype).flatten(1, 2).transpose(1, 2), scores], dim=-1)
    scores = scores * (key_width**-0.5 if window.scale is None else window.scale)
    scores = (scores.unflatten(1, (kv_heads, -1)) + bias.to(dtype)[:, :, None]).flatten(1, 2)

    shift = scores.amax(dim=-1, keepdim=True)
    if window.anchor == "absolute":
        shift = shift.detach().clamp(min=LOWEST_SHIFT)
    weights = (scores - shift).exp()
    if window.factor is not None:
        weights = weights * window.factor.to(dtype)[:, None]
    denominator = weights.sum(-1, keepdim=True)
    numerator = weights[..., kv_heads * sinks :] @ ring_v.to(dtype)
    if sinks:
        numerator = numerator + weights[..., : kv_heads * sinks] @ sink_v.to(dtype).flatten(1, 2)
    if width:
        linear = (scale * q[:, 0].to(dtype)).unflatten(1, (kv_heads, -1)) @ s
        linear = linear.flatten(1, 2)
        if window.anchor == "absolute":
            linear = linear * (-shift).exp()
        numerator, denominator = numerator + linear[..., :-1], denominator + linear[..., -1:]
    o = divide(numerator, denominator)[:, None].to(v.dtype)
    after = WindowState(s, ring_k, ring_v, sink_k, sink_v, state.count + 1)
    if mask is not None:
        o = torch.where(keep[..., None], o, 0.0)
        after = after.select(mask[:, 0], state)
    return o, after
