"""The window of `gated_linear_attention`: a band of softmax weights, and linear attention over what left the band.

The softmax part gives the average y_t of the values under the window's weights and lse_t = log sum_j exp(s_tj); the
linear part is the chunked recurrence over keys that come `lengths[h]` steps late. Both share one denominator:

    o_t = (a_t y_t + c_t N_t) / (a_t + c_t Z_t)     a = factor * exp(lse - shift), c = exp(-shift) or 1

with N and Z the linear numerator and denominator. Masked tokens are moved behind the valid ones first, so below a step
is a valid token. Steps of this call count from 0; tokens of the initial state have negative steps, down to -count.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..steps import document_starts, take, valid_first
from .decode import windowed_attention_step
from .linear_part import divide, linear_attention
from .softmax_part import softmax_part
from .state import LOWEST_SHIFT, Window, WindowState, final_rings, ring_offsets

FAR = 1 << 40  # a step before all others


def windowed_attention(
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
    """`gated_linear_attention` with a window; arguments and results as there."""
    window = replace(window, lengths=tuple(window.lengths))
    batch, time, _, width = q.shape
    earlier = state
    if state is None:
        sizes = window.k.shape[-1], width, v.shape[-1]
        state = WindowState.zeros(batch, window.lengths, window.sinks, *sizes, dtype=v.dtype, device=v.device)
        state.ring_k, state.sink_k = state.ring_k.to(window.k.dtype), state.sink_k.to(window.k.dtype)
        window = replace(window, ring_features=None)
    if time == 1:
        return windowed_attention_step(q, k, v, g, scale, window, state, mask)

    valid = torch.full((batch,), time, device=v.device)
    keep = back = None
    if mask is not None and not bool(mask.all()):
        order, back = valid_first(mask)
        valid, keep = mask.sum(dim=1), mask.gather(1, order)
        q, k, v, window_q, window_k = (_reorder(x, order, keep) for x in (q, k, v, window.q, window.k))
        q_sink = None if window.q_sink is None else _reorder(window.q_sink, order, keep)
        window = replace(window, q=window_q, k=window_k, q_sink=q_sink)
        seq_ids = None if seq_ids is None else seq_ids.gather(1, order)

    resets = None if seq_ids is None else document_starts(seq_ids, keep)
    starts = _starts(state.count, resets, time)
    simple = earlier is None and resets is None
    o, lse, largest = softmax_part(window, v, earlier, None if simple else starts, resets)
    s = state.s
    if width and (earlier is not None or time > min(window.lengths) + window.sinks):
        late_k, late_v = _leaving_tokens(k, v, window, earlier, starts)
        initial = None if earlier is None else earlier.s
        linear, s = linear_attention(q, late_k, late_v, g, None, scale, initial, resets, keep)
        o = _share_denominator(o, lse, largest, linear, window.factor)
    else:
        # Nothing has left the window yet. Zero gradients, not none: distributed training waits for every parameter.
        o = _ZeroGradients.apply(o, q, k, g, window.factor)
    o = o.to(v.dtype)
    if keep is not None and back is not None:
        o = take(torch.where(keep[..., None, None], o, 0.0), back)
    last = (valid - 1).clamp(min=0)[:, None]
    return o, WindowState(s, *final_rings(window, v, state, starts.gather(1, last)[:, 0], valid))


class _ZeroGradients(torch.autograd.Function):
    """The first tensor unchanged; the others, or None, get a gradient of zeros."""

    @staticmethod
    def forward(ctx, o: Tensor, *others: Tensor | None) -> Tensor:
        ctx.save_for_backward(*others)
        return o.view_as(o)

    @staticmethod
    def backward(ctx, grad: Tensor):
        zeros = (
            torch.zeros_like(x) if needed else None
            for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        )
        return grad, *zeros


def _reorder(x: Tensor, order: Tensor, keep: Tensor) -> Tensor:
    """x (B, T, heads, n) in the order (B, T), zero where `keep` (B, T) is False, whatever stood there, even nan."""
    return torch.where(keep[..., None, None], take(x, order), 0.0)


def _starts(count: Tensor, resets: Tensor | None, time: int) -> Tensor:
    """(B, T) the step at which each step's document began."""
    if resets is None:
        return (-count)[:, None].expand(-1, time)
    steps = torch.arange(time, device=count.device)
    begun = torch.where(resets, steps, -FAR)
    begun[:, 0] = -count
    return begun.cummax(dim=1).values


def _leaving_tokens(
    k: Tensor, v: Tensor, window: Window, state: WindowState | None, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """What enters the linear state at each step: keys (B, T, Hk, K), zero where nothing does, and values with a one."""
    time = v.shape[1]
    late_k, late_v = [], []
    steps = torch.arange(time, device=v.device)
    for head, (offset, length) in enumerate(zip(ring_offsets(window.lengths), window.lengths, strict=True)):
        if state is None or window.ring_features is None:
            old_k, old_v = (x.new_zeros(len(x), length, x.shape[-1]) for x in (k, v))
        else:
            place = torch.remainder(state.count[:, None] + torch.arange(-length, 0, device=v.device), length)
            old_k, old_v = take(window.ring_features, offset + place), take(state.ring_v, offset + place)
        entering = (steps - length >= starts + window.sinks)[..., None]
        late_k.append(torch.where(entering, torch.cat([old_k.to(k.dtype), k[:, :, head]], 1)[:, :time], 0.0))
        late_v.append(torch.cat([old_v.to(v.dtype), v[:, :, head]], 1)[:, :time])
    values = torch.stack(late_v, dim=2)
    return torch.stack(late_k, dim=2), torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)


def _share_denominator(y: Tensor, lse: Tensor, largest: Tensor | None, linear: Tensor, factor: Tensor | None) -> Tensor:
    """y (B, T, H, V), lse and largest (B, T, H), linear (B, T, H, V+1), whose last column is the denominator."""
    if factor is not None:
        lse = lse + factor.to(lse.dtype).log()
    shift = lse.detach().clamp(min=LOWEST_SHIFT) if largest is None else largest
    unit = (-shift).exp() if largest is None else torch.ones_like(shift)
    near = (lse - shift).exp()
    share = divide(torch.ones_like(near), near + unit * linear[..., -1])
    return torch.addcmul((near * share)[..., None] * y, (unit * share)[..., None], linear[..., :-1])
