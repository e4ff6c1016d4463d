"""The kernels as mixers call them: with what the `Context` knows, and in place where one token is decoded."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ...kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from ...kernels.short_conv import short_conv, short_conv_step
from .mixer import Context

__all__ = ["convolve", "linear_attention"]


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


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, ctx: Context, *, activation: str | None
) -> tuple[Tensor, Tensor]:
    """`short_conv` over a call's tokens: y (B, T, D) and the inputs that the next call needs."""
    if ctx.in_place and state is not None and state.dtype == x.dtype:
        return short_conv_step(x[:, 0], weight, bias, state, activation=activation)[:, None], state
    return short_conv(x, weight, bias, activation=activation, initial_state=state, seq_ids=ctx.seq_ids, mask=ctx.mask)
