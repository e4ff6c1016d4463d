"""The equation of `block_scan` as a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear_scan.chunked import scan_dtype
from ..steps import Documents


def block_scan(
    *, a: Tensor, x: Tensor, initial_state: Tensor | None, seq_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.block_scan`."""
    batch, time, blocks, width = x.shape
    dtype = scan_dtype(x.dtype)
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


@torch.no_grad()
def block_scan_step(*, a: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """See `kernels.block_scan_step`."""
    h, after = block_scan(a=a[:, None], x=x[:, None], initial_state=state, seq_ids=None, mask=None)
    state.copy_(after)
    return h[:, 0]
