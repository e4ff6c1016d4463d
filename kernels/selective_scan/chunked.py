"""Selective scan in plain torch with autograd, on any device: chunk by chunk, each an elementwise linear scan.

Within a chunk the decays and inputs of all (D, N) states stand in memory at once and `linear_scan` runs over them; with
gradients a chunk is computed again in backward, so that (B, T, D, N) never exists. Nothing is divided by a decay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..dtypes import state_dtype
from ..linear_scan.chunked import linear_scan
from ..steps import document_starts

CHUNK = 64


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
    batch, _, channels = x.shape
    dtype, output_dtype = state_dtype(x.dtype), x.dtype
    x, dt, a, b, c = (tensor.to(dtype) for tensor in (x, dt, a, b, c))
    if mask is not None:  # dt = 0: the decay is 1 and nothing comes in
        x, dt, b, c = (torch.where(mask[..., None], tensor, 0.0) for tensor in (x, dt, b, c))
    h = x.new_zeros(batch, channels, a.shape[1]) if initial_state is None else initial_state.to(dtype)
    starts = None if seq_ids is None else document_starts(seq_ids, mask).split(CHUNK, dim=1)
    outputs = []
    # split once, not sliced: the gradient of a slice is as long as the whole sequence
    for index, steps in enumerate(zip(*(tensor.split(CHUNK, dim=1) for tensor in (x, dt, b, c)), strict=True)):
        begins = None if starts is None else starts[index]
        if torch.is_grad_enabled():
            y, h = checkpoint(_chunk, *steps, a, h, begins, use_reentrant=False, preserve_rng_state=False)
        else:
            y, h = _chunk(*steps, a, h, begins)
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    if d is not None:
        y = y + d.to(dtype) * x
    return y.to(output_dtype), h


def _chunk(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, h: Tensor, begins: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, D) of L steps, without D x, and the state after them."""
    decay = torch.exp(dt[..., None] * a)
    if begins is not None:
        decay = torch.where(begins[..., None, None], 0.0, decay)
    inputs = (dt * x)[..., None] * b[:, :, None]
    states, last = linear_scan(
        a=decay.flatten(2), x=inputs.flatten(2), initial_state=h.flatten(1), seq_ids=None, mask=None
    )
    return (states.unflatten(2, h.shape[1:]) @ c[..., None]).squeeze(3), last.unflatten(1, h.shape[1:])


def selective_scan_step(
    *, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor
) -> Tensor:
    """See `kernels.selective_scan_step`."""
    with torch.no_grad():
        values, dt, b, c = (tensor.to(state.dtype) for tensor in (x, dt, b, c))
        state.mul_(torch.exp(dt[..., None] * a)).add_((dt * values)[..., None] * b[:, None])
        y = (state @ c[..., None]).squeeze(2)
        return (y if d is None else y + d * values).to(x.dtype)
