"""The equation of `delta_rule` as a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import state_dtype
from ..steps import Documents, one_step


def delta_rule(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.delta_rule`."""
    batch, time, heads, values = v.shape
    dtype = state_dtype(v.dtype)
    if initial_state is None:
        state = v.new_zeros(batch, heads, q.shape[-1], values, dtype=dtype)
    else:
        state = initial_state.to(dtype)
    g = v.new_zeros(batch, time, heads, 1, dtype=dtype) if g is None else g
    documents = Documents(batch, seq_ids, mask, v.device)
    outputs = []
    for t in range(time):
        valid, begins = (flags[:, None, None, None] for flags in documents.step(t))
        q_t, k_t, v_t, a_t, b_t, g_t = (
            torch.where(valid[..., 0], x[:, t].to(dtype), 0.0) for x in (q, k, v, a, b, g)
        )  # (B, heads, width); whatever stood at a masked step is gone
        before = torch.where(begins, 0.0, state)
        read = torch.einsum("bhk,bhkv->bhv", b_t, before)
        after = g_t[..., None].exp() * before + a_t[..., None] * read[..., None, :] + k_t[..., None] * v_t[..., None, :]
        state = torch.where(valid, after, state)
        q_t = q_t.unflatten(1, (heads, -1))  # (B, Hk, H // Hk, K)
        o_t = scale * torch.einsum("bhgk,bhkv->bhgv", q_t, after).flatten(1, 2)
        outputs.append(torch.where(valid[..., 0], o_t, 0.0))
    return torch.stack(outputs, dim=1).to(v.dtype), state


delta_rule_step = one_step(delta_rule, "q", "k", "v", "a", "b", "g")
