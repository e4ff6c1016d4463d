"""The equation of `selective_scan` as a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import state_dtype
from ..steps import Documents, one_step


def selective_scan(
    *,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.selective_scan`."""
    batch, time, channels = x.shape
    dtype = state_dtype(x.dtype)
    a = a.to(dtype)
    d = a.new_zeros(channels) if d is None else d.to(dtype)
    h = a.new_zeros(batch, channels, a.shape[1]) if initial_state is None else initial_state.to(dtype)
    documents = Documents(batch, seq_ids, mask, x.device)
    outputs = []
    for t in range(time):
        valid, begins = documents.step(t)
        # whatever stands at a masked step stays out
        x_t, dt_t, b_t, c_t = (torch.where(valid[:, None], values[:, t].to(dtype), 0.0) for values in (x, dt, b, c))
        decay = torch.exp(dt_t[:, :, None] * a)
        after = decay * torch.where(begins[:, None, None], 0.0, h) + (dt_t * x_t)[:, :, None] * b_t[:, None]
        outputs.append((after * c_t[:, None]).sum(2) + d * x_t)  # zero at a masked step: C and x are
        h = torch.where(valid[:, None, None], after, h)
    return torch.stack(outputs, dim=1).to(x.dtype), h


selective_scan_step = one_step(selective_scan, "x", "dt", "b", "c")
