"""The equation of `block_scan` as a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import state_dtype
from ..steps import Documents, one_step


def block_scan(
    *, a: Tensor, x: Tensor, initial_state: Tensor | None, seq_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.block_scan`."""
    batch, time, blocks, width = x.shape
    dtype = state_dtype(x.dtype)
    h = x.new_zeros(batch, blocks, width, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    documents = Documents(batch, seq_ids, mask, x.device)
    outputs = []
    for t in range(time):
        valid, begins = (flags[:, None, None] for flags in documents.step(t))
        a_t = torch.where(valid[..., None], a[:, t].to(dtype), 0.0)  # whatever stood at a masked step
        x_t = torch.where(valid, x[:, t].to(dtype), 0.0)
        after = torch.einsum("bhij,bhj->bhi", a_t, torch.where(begins, 0.0, h)) + x_t
        outputs.append(torch.where(valid, after, 0.0))
        h = torch.where(valid, after, h)
    return torch.stack(outputs, dim=1).to(x.dtype), h


block_scan_step = one_step(block_scan, "a", "x")
