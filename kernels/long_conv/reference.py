"""The equation of `long_conv` as a loop over time, and one step of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..steps import Documents


def state_dtype(u: Tensor, *system: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """In which the input and the outputs are computed, and the state's."""
    real = torch.promote_types(u.dtype, torch.float32)
    is_complex = any(x is not None and x.is_complex() for x in system)
    return real, torch.promote_types(real, torch.complex64) if is_complex else real


def times(matrices: Tensor, x: Tensor) -> Tensor:
    """matrices (D, M, N) times columns x (..., D, N, k), without a copy of them for every row of a batch."""
    return torch.einsum("dmn,...dnk->...dmk", matrices, x)


def advance(state: Tensor, a: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
    """A state, for a state (B, D, N)."""
    if a.ndim == 3:
        return times(a, state[..., None])[..., 0]
    after = a * state
    if p is not None and q is not None:
        after = after + times(p, times(q, state[..., None]).real.to(p.dtype))[..., 0]
    return after


def read(state: Tensor, u: Tensor, c: Tensor, d: Tensor | None) -> Tensor:
    """Re(c state) + d u, (B, D) or (B, D, M), for a state (B, D, N) and u (B, D)."""
    if c.ndim == 2:
        y = (c * state).sum(-1).real
        return y if d is None else y + d * u
    y = times(c, state[..., None])[..., 0].real
    return y if d is None else y + d * u[..., None]


def long_conv(
    *,
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.long_conv`."""
    batch, time, channels = u.shape
    real, dtype = state_dtype(u, a, b, c, p, q, initial_state)
    a, b, c = a.to(dtype), b.to(dtype), c.to(dtype)
    p, q = (x if x is None else x.to(dtype) for x in (p, q))
    h = u.new_zeros(batch, channels, b.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    documents = Documents(batch, seq_ids, mask, u.device)
    outputs = []
    for t in range(time):
        valid, begins = documents.step(t)
        u_t = torch.where(valid[:, None], u[:, t].to(real), 0.0)  # whatever stood there
        after = advance(torch.where(begins[:, None, None], 0.0, h), a, p, q) + b * u_t[..., None]
        h = torch.where(valid[:, None, None], after, h)
        y = read(after, u_t, c, d)
        outputs.append(torch.where(valid.view(-1, *[1] * (y.ndim - 1)), y, 0.0))
    return torch.stack(outputs, dim=1).to(u.dtype), h


@torch.no_grad()
def long_conv_step(
    *,
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    state: Tensor,
) -> Tensor:
    """See `kernels.long_conv_step`."""
    real = torch.promote_types(u.dtype, torch.float32)
    a, b, c = a.to(state.dtype), b.to(state.dtype), c.to(state.dtype)
    p, q = (x if x is None else x.to(state.dtype) for x in (p, q))
    wide = u.to(real)
    state.copy_(advance(state, a, p, q).addcmul_(b, wide[..., None].to(state.dtype)))
    return read(state, wide, c, d).to(u.dtype)
