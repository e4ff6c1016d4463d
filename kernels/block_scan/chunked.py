"""Block scan in plain torch with autograd, on any device: steps are joined in pairs, the pairs in pairs, and so on.

Two steps are one, h -> (A_2 A_1) h + (A_2 x_1 + x_2). On the way up the tree T steps become one in log2(T) rounds; on
the way down the state before each pair gives the one between its halves. N times the work of the loop, in 2 log2(T)
rounds instead of T.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import state_dtype
from ..steps import document_starts


def block_scan(
    *, a: Tensor, x: Tensor, initial_state: Tensor | None, seq_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.block_scan`."""
    batch, time, blocks, width = x.shape
    dtype, output_dtype = state_dtype(x.dtype), x.dtype
    a, x = a.to(dtype), x.to(dtype)
    if seq_ids is not None:
        a = torch.where(document_starts(seq_ids, mask)[..., None, None, None], 0.0, a)
    identity = torch.eye(width, dtype=dtype, device=x.device)
    if mask is not None:
        a = torch.where(mask[..., None, None, None], a, identity)
        x = torch.where(mask[..., None, None], x, 0.0)
    h = x.new_zeros(batch, blocks, width) if initial_state is None else initial_state.to(dtype)
    more = (1 << (time - 1).bit_length()) - time  # appended steps change nothing
    if more:
        a = torch.cat([a, identity.expand(batch, more, blocks, -1, -1)], 1)
        x = F.pad(x, (0, 0, 0, 0, 0, more))
    states = _apply(a, _states_before(a, x, h)) + x
    last = states[:, -1].clone()
    states = states[:, :time]
    if mask is not None:
        states = torch.where(mask[..., None, None], states, 0.0)
    return states.to(output_dtype), last


def _apply(a: Tensor, h: Tensor) -> Tensor:
    """A h, (..., N)."""
    return (a @ h[..., None])[..., 0]


def _states_before(a: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """(B, T, H, N) the state that each step reads, T a power of two, from h (B, H, N) before the first."""
    if a.shape[1] == 1:
        return h[:, None]
    a_first, a_second = a.unflatten(1, (-1, 2)).unbind(2)
    x_first, x_second = x.unflatten(1, (-1, 2)).unbind(2)
    before = _states_before(a_second @ a_first, _apply(a_second, x_first) + x_second, h)
    between = _apply(a_first, before) + x_first
    return torch.stack([before, between], 2).flatten(1, 2)


def block_scan_step(*, a: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """See `kernels.block_scan_step`."""
    with torch.no_grad():
        return state.copy_(_apply(a.to(state.dtype), state) + x).to(x.dtype, copy=True)
