"""The kernels as mixers call them: with what the `Context` knows, and in place where one token is decoded."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ...kernels.block_scan import block_scan, block_scan_step
from ...kernels.delta_rule import delta_rule, delta_rule_step
from ...kernels.gated_linear_attention import Window, WindowState, gated_linear_attention, gated_linear_attention_step
from ...kernels.linear_scan import linear_scan, linear_scan_step
from ...kernels.long_conv import long_conv, long_conv_step
from ...kernels.selective_scan import selective_scan, selective_scan_step
from ...kernels.short_conv import short_conv, short_conv_step
from ...kernels.softmax_scan import softmax_scan, softmax_scan_step
from ...kernels.softmax_scan.state import SoftmaxState
from ...kernels.window_step import window_step
from .mixer import Context

__all__ = [
    "convolve",
    "delta",
    "linear_attention",
    "linear_attention_matrix",
    "one_hot_values",
    "scan",
    "scan_blocks",
    "selective",
    "softmax_average",
    "state_space",
    "token_shift",
    "window_attention",
]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    ctx: Context,
    *,
    bonus: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """`gated_linear_attention` over a call's tokens: the output (B, T, H, V) and the state after them."""
    options = {"bonus": bonus, "scale": scale, "normalize": normalize}
    if ctx.in_place and state is not None:
        g = None if g is None else (g if g.ndim == 1 else g[:, 0])
        return gated_linear_attention_step(q[:, 0], k[:, 0], v[:, 0], g, state, **options)[:, None], state
    o, after = gated_linear_attention(q, k, v, g, **options, initial_state=state, seq_ids=ctx.seq_ids, mask=ctx.mask)
    return o, cast(Tensor, after)


def one_hot_values(q: Tensor, heads: int) -> Tensor:
    """Values that tell where an output comes from: (B, T, heads, T), of q (B, T, H, K); 1 at the value's own step."""
    batch, time = q.shape[:2]
    return torch.eye(time, dtype=q.dtype, device=q.device)[None, :, None].expand(batch, time, heads, time)


def linear_attention_matrix(
    q: Tensor, k: Tensor, g: Tensor | None, ctx: Context, *, scale: float | None = None, normalize: bool = False
) -> Tensor:
    """M (B, H, T, T) with which `linear_attention` sums values from nothing seen: o_t = sum_j M_tj v_j.

    It is what the kernel makes of `one_hot_values`, so documents, padding and any kind of decay are in it.
    """
    o, _ = linear_attention(q, k, one_hot_values(q, k.shape[2]), g, None, ctx, scale=scale, normalize=normalize)
    return o.transpose(1, 2)


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    ctx: Context,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_rule` over a call's tokens: the output (B, T, H, V) and the state (B, Hk, K, V) after them."""
    if ctx.in_place and state is not None:
        g = None if g is None else g[:, 0]
        o = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], a[:, 0], b[:, 0], g, state, scale=scale)
        return o[:, None], state
    return delta_rule(q, k, v, a, b, g, scale=scale, initial_state=state, seq_ids=ctx.seq_ids, mask=ctx.mask)


def scan(a: Tensor, x: Tensor, state: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor]:
    """`linear_scan` over a call's tokens: all states (B, T, D), and the last one (B, D)."""
    if ctx.in_place and state is not None:
        return linear_scan_step(a[:, 0], x[:, 0], state)[:, None], state
    return linear_scan(a, x, initial_state=state, seq_ids=ctx.seq_ids, mask=ctx.mask)


def scan_blocks(a: Tensor, x: Tensor, state: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor]:
    """`block_scan` over a call's tokens: all states (B, T, H, N), and the last one (B, H, N)."""
    if ctx.in_place and state is not None:
        return block_scan_step(a[:, 0], x[:, 0], state)[:, None], state
    return block_scan(a, x, initial_state=state, seq_ids=ctx.seq_ids, mask=ctx.mask)


def selective(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor | None, ctx: Context
) -> tuple[Tensor, Tensor]:
    """`selective_scan` over a call's tokens: y (B, T, D) and the state (B, D, N) after them."""
    if ctx.in_place and state is not None:
        return selective_scan_step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], d, state)[:, None], state
    return selective_scan(x, dt, a, b, c, d, initial_state=state, seq_ids=ctx.seq_ids, mask=ctx.mask)


def softmax_average(
    k: Tensor,
    v: Tensor,
    state: SoftmaxState | None,
    ctx: Context,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """`softmax_scan` over a call's tokens: averages (B, T, H, V) and the state after them."""
    if ctx.in_place and state is not None:
        return softmax_scan_step(k[:, 0], v[:, 0], state, decay=decay, bonus=bonus)[:, None], state
    options = {"decay": decay, "bonus": bonus}
    return softmax_scan(k, v, **options, initial_state=state, seq_ids=ctx.seq_ids, mask=ctx.mask)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, ctx: Context, *, activation: str | None
) -> tuple[Tensor, Tensor]:
    """`short_conv` over a call's tokens: y (B, T, D) and the inputs that the next call needs."""
    if ctx.in_place and state is not None and state.dtype == x.dtype:
        return short_conv_step(x[:, 0], weight, bias, state, activation=activation)[:, None], state
    return short_conv(x, weight, bias, activation=activation, initial_state=state, seq_ids=ctx.seq_ids, mask=ctx.mask)


def token_shift(x: Tensor, last: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor]:
    """x (B, T, D) of the token before in the same document, zeros before the first; and x (B, D) of the last token.

    Args:
        last: x of the last token of the calls before; None: none.
    """
    if ctx.mask is None and ctx.seq_ids is None:
        first = torch.zeros_like(x[:, :1]) if last is None else last[:, None].to(x.dtype)
        return torch.cat([first, x[:, :-1]], 1), x[:, -1].clone()
    # A convolution of two taps that looks at the older one; it knows of documents and padding.
    weight = x.new_tensor([1.0, 0.0]).expand(x.shape[-1], 2)
    before = None if last is None else last[:, :, None].to(x.dtype)
    y, after = short_conv(x, weight, initial_state=before, seq_ids=ctx.seq_ids, mask=ctx.mask)
    return y, after[:, :, 0].clone()


def state_space(
    u: Tensor, system: dict[str, Tensor], d: Tensor | None, state: Tensor | None, ctx: Context
) -> tuple[Tensor, Tensor]:
    """`long_conv` over a call's tokens: y (B, T, D) or (B, T, D, M), and the state (B, D, N) after them.

    Args:
        system: a, b, c and, where there is a low-rank part, p and q.
    """
    if ctx.in_place and state is not None:
        return long_conv_step(u[:, 0], **system, d=d, state=state)[:, None], state
    return long_conv(u, **system, d=d, initial_state=state, seq_ids=ctx.seq_ids, mask=ctx.mask)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], state: WindowState | None, ctx: Context
) -> tuple[Tensor, WindowState]:
    """Softmax attention of the rotated q, k over the last tokens, in a state of fixed size.

    Args:
        q: (B, T, H, d). k: (B, T, Hk, d). v: (B, T, Hk, dv). lengths: of the window of each kv head.

    Returns:
        The output (B, T, H, dv) and the state, which has no features.
    """
    alone = ctx.in_place and state is not None
    if alone:
        o = window_step(q[:, 0, :, :0], q[:, 0], k[:, 0], v[:, 0], state, lengths=lengths)
        return o[:, None].to(v.dtype), cast(WindowState, state)
    call = {"initial_state": state, "seq_ids": ctx.seq_ids, "mask": ctx.mask}
    o, after = gated_linear_attention(q[..., :0], k[..., :0], v, window=Window(q=q, k=k, lengths=lengths), **call)
    return o, cast(WindowState, after)
