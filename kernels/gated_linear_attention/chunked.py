"""Gated linear attention in plain torch with autograd, linear in time: `window.py`, or `linear_part.py` without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import state_dtype
from ..steps import document_starts
from .linear_part import divide, gated_linear_attention_step, linear_attention
from .state import Window, WindowState
from .window import windowed_attention

__all__ = ["gated_linear_attention", "gated_linear_attention_step"]


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
    if window is not None:
        return windowed_attention(q, k, v, g, scale, window, initial_state, seq_ids, mask)
    dtype = state_dtype(v.dtype)
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) if normalize else v
    resets = None if seq_ids is None else document_starts(seq_ids, mask)
    o, state = linear_attention(q, k, values, g, bonus, scale, initial_state, resets, mask)
    if normalize:
        o = divide(o[..., :-1], o[..., -1:])
    return o.to(v.dtype), state.to(dtype)
