"""Linear scan in plain torch with autograd, on any device: all chunks step by step at once, then chunk by chunk.

With L steps a chunk and C chunks there are L + C sequential operations instead of L * C, with L close to C. Nothing is
divided and no logarithm taken, so a_t = 0 and |a_t| > 1 are exact.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import state_dtype
from ..steps import document_starts


def linear_scan(
    *, a: Tensor, x: Tensor, initial_state: Tensor | None, seq_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.linear_scan`."""
    batch, time, channels = x.shape
    dtype = state_dtype(x.dtype)
    output_dtype = x.dtype
    a, x = a.to(dtype), x.to(dtype)
    if seq_ids is not None:
        a = torch.where(document_starts(seq_ids, mask)[..., None], 0.0, a)
    if mask is not None:
        a, x = torch.where(mask[..., None], a, 1.0), torch.where(mask[..., None], x, 0.0)
    h = x.new_zeros(batch, channels) if initial_state is None else initial_state.to(dtype)

    length = max(1, math.isqrt(time))
    chunks = -(-time // length)
    padding = (0, 0, 0, chunks * length - time)  # appended steps change nothing: a = 1, x = 0
    a = F.pad(a, padding, value=1.0).unflatten(1, (chunks, length))
    x = F.pad(x, padding).unflatten(1, (chunks, length))
    factors, sums = [a[:, :, 0]], [x[:, :, 0]]
    for t in range(1, length):
        factors.append(a[:, :, t] * factors[-1])
        sums.append(a[:, :, t] * sums[-1] + x[:, :, t])
    before = []
    for chunk in range(chunks):
        before.append(h)
        h = factors[-1][:, chunk] * h + sums[-1][:, chunk]
    states = torch.stack(sums, dim=2) + torch.stack(factors, dim=2) * torch.stack(before, dim=1)[:, :, None]
    states = states.flatten(1, 2)[:, :time]
    if mask is not None:
        states = torch.where(mask[..., None], states, 0.0)
    return states.to(output_dtype), h


def linear_scan_step(*, a: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """See `kernels.linear_scan_step`."""
    with torch.no_grad():
        return state.mul_(a).add_(x).to(x.dtype, copy=True)
