"""The equations of `gated_linear_attention` as loops over time: what the other backends are tested against.

Everything is computed in float32, or in float64 where v is float64.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..dtypes import state_dtype
from ..steps import Documents, one_step
from .state import LOWEST_SHIFT, Window, WindowState, ring_positions, ring_slots


def gated_linear_attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    normalize: bool,
    window: Window | None,
    initial_state: Any,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | WindowState]:
    """See `kernels.gated_linear_attention`."""
    if mask is not None:
        q, k, v = (torch.where(mask[..., None, None], x, 0.0) for x in (q, k, v))  # whatever stands there, even nan
    if window is not None:
        return _with_window(q, k, v, g, scale, window, initial_state, seq_ids, mask)
    batch, time, heads, width = q.shape
    group = heads // v.shape[2]
    dtype = state_dtype(v.dtype)
    output_dtype = v.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    s = v.new_zeros(batch, v.shape[2], width, v.shape[3]) if initial_state is None else initial_state.to(dtype)
    documents = Documents(batch, seq_ids, mask, v.device)
    outputs = []
    for t in range(time):
        valid, resets = documents.step(t)
        before = torch.where(resets[:, None, None, None], 0.0, s)
        update = k[:, t, :, :, None] * v[:, t, :, None, :]
        after = _decay(g, t, dtype) * before + update
        query = scale * q[:, t]
        if bonus is None:
            o = torch.einsum("bhk,bhkv->bhv", query, after.repeat_interleave(group, 1))
        else:
            o = torch.einsum("bhk,bhkv->bhv", query, before.repeat_interleave(group, 1))
            o = o + torch.einsum("bhk,bhkv->bhv", query * bonus.to(dtype), update.repeat_interleave(group, 1))
        outputs.append(torch.where(valid[:, None, None], o, 0.0))
        s = torch.where(valid[:, None, None, None], after, s)
    o = torch.stack(outputs, dim=1)
    if normalize:
        o = divide(o[..., :-1], o[..., -1:])
    return o.to(output_dtype), s


gated_linear_attention_step = one_step(functools.partial(gated_linear_attention, window=None), "q", "k", "v", "g")


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 with zero gradients where the denominator is 0."""
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def _decay(g: Tensor | None, t: int, dtype: torch.dtype) -> Tensor | float:
    """Factor of the state (B or 1, Hk, K or 1, 1) at step t."""
    if g is None:
        return 1.0
    return g.to(dtype).exp().view(1, -1, 1, 1) if g.ndim == 1 else g[:, t].to(dtype).exp()[..., None]


def _with_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    window: Window,
    state: WindowState | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, WindowState]:
    batch, time, heads, width = q.shape
    lengths, kv_heads, group = window.lengths, v.shape[2], heads // v.shape[2]
    dtype, key_width, value_width = state_dtype(v.dtype), window.k.shape[-1], v.shape[-1]
    if state is None:
        state = WindowState.zeros(batch, lengths, window.sinks, key_width, width, value_width, dtype, v.device)
    features = window.ring_features
    if features is None:
        features = v.new_zeros(batch, sum(lengths), width)
    elif features.shape[1] != sum(lengths):  # of the rows that the one token takes over
        slots = ring_slots(state.count, lengths)[..., None].expand_as(features)
        features = features.new_zeros(batch, sum(lengths), width).scatter(1, slots, features)
    sections = list(lengths)
    ring_k, ring_v, ring_f = (list(x.to(dtype).split(sections, dim=1)) for x in (state.ring_k, state.ring_v, features))
    s, sink_k, sink_v = (list(x.to(dtype).unbind(1)) for x in (state.s, state.sink_k, state.sink_v))
    count = state.count
    if mask is not None:
        hidden = {"q": window.q, "k": window.k, "q_sink": window.q_sink}
        hidden = {n: torch.where(mask[..., None, None], x, 0.0) for n, x in hidden.items() if x is not None}
        window = replace(window, **hidden)
    documents = Documents(batch, seq_ids, mask, v.device)
    queries = window.q.to(dtype).unflatten(2, (kv_heads, group))
    sink_queries = queries if window.q_sink is None else window.q_sink.to(dtype).unflatten(2, (kv_heads, group))
    score_scale = key_width**-0.5 if window.scale is None else window.scale
    factor = v.new_ones(heads, dtype=dtype) if window.factor is None else window.factor.to(dtype)
    outputs = []
    for t in range(time):
        valid, begins = documents.step(t)
        count = torch.where(begins, 0, count)
        step = []
        for h, length in enumerate(lengths):
            write = (torch.arange(length, device=v.device) == (count % length)[:, None]) & valid[:, None]
            leaves = (valid & (count - length >= window.sinks))[:, None, None]
            leaving_k = (ring_f[h] * write[..., None]).sum(1)
            leaving_v = (ring_v[h] * write[..., None]).sum(1)
            leaving = leaving_k[:, :, None] * torch.cat([leaving_v, torch.ones_like(leaving_v[:, :1])], -1)[:, None]
            after = torch.where(begins[:, None, None], 0.0, s[h])
            after = after * (1.0 if g is None else g[h].to(dtype).exp()) + torch.where(leaves, leaving, 0.0)
            s[h] = torch.where(valid[:, None, None], after, s[h])
            ring_k[h] = torch.where(write[..., None], window.k[:, t, h, None].to(dtype), ring_k[h])
            ring_v[h] = torch.where(write[..., None], v[:, t, h, None].to(dtype), ring_v[h])
            ring_f[h] = torch.where(write[..., None], k[:, t, h, None].to(dtype), ring_f[h])
            first = (torch.arange(window.sinks, device=v.device) == count[:, None]) & valid[:, None]
            sink_k[h] = torch.where(first[..., None], window.k[:, t, h, None].to(dtype), sink_k[h])
            sink_v[h] = torch.where(first[..., None], v[:, t, h, None].to(dtype), sink_v[h])

            held = ring_positions(count + 1, (length,))
            inside = held >= window.sinks
            present = torch.arange(window.sinks, device=v.device) <= count[:, None]
            scores = score_scale * torch.cat(
                [
                    torch.einsum("bgd,brd->bgr", queries[:, t, h], ring_k[h]),
                    torch.einsum("bgd,bsd->bgs", sink_queries[:, t, h], sink_k[h]),
                ],
                dim=-1,
            )
            scores = scores.masked_fill(~torch.cat([inside, present], dim=-1)[:, None], -torch.inf)
            values = torch.cat([ring_v[h], sink_v[h]], dim=1)
            linear = torch.einsum("bgk,bkv->bgv", scale * q[:, t, h * group : (h + 1) * group].to(dtype), s[h])
            step.append(_share(scores, values, linear, factor[h * group : (h + 1) * group], window.anchor))
        outputs.append(torch.where(valid[:, None, None], torch.cat(step, dim=1), 0.0))
        count = count + valid
    filled = (ring_positions(count, lengths) >= 0)[..., None]
    present = (torch.arange(window.sinks, device=v.device) < count[:, None])[:, None, :, None]
    final = WindowState(
        s=torch.stack(s, dim=1),
        ring_k=torch.where(filled, torch.cat(ring_k, dim=1), 0.0).to(window.k.dtype),
        ring_v=torch.where(filled, torch.cat(ring_v, dim=1), 0.0).to(v.dtype),
        sink_k=torch.where(present, torch.stack(sink_k, dim=1), 0.0).to(window.k.dtype),
        sink_v=torch.where(present, torch.stack(sink_v, dim=1), 0.0).to(v.dtype),
        count=count,
    )
    return torch.stack(outputs, dim=1).to(v.dtype), final


def _share(scores: Tensor, values: Tensor, linear: Tensor, factor: Tensor, anchor: str) -> Tensor:
    """One step of one head: scores (B, g, n), values (B, n, V), linear numerator and denominator (B, g, V+1)."""
    largest = scores.max(dim=-1, keepdim=True).values
    largest = torch.where(largest.isfinite(), largest, 0.0)  # a masked step before the first token sees nothing
    if anchor == "max":
        shift, linear_weight = largest, 1.0
    else:
        shift = largest.detach().clamp(min=LOWEST_SHIFT)
        linear_weight = (-shift).exp()
    weights = factor[None, :, None] * (scores - shift).exp()
    numerator = torch.einsum("bgn,bnv->bgv", weights, values) + linear_weight * linear[..., :-1]
    denominator = weights.sum(-1, keepdim=True) + linear_weight * linear[..., -1:]
    return divide(numerator, denominator)
