"""Delta rule in plain torch with autograd, on any device: chunks of matrix products, then one product a chunk.

Within a chunk, u_i = b_i^T S_{i-1} depends on the chunk's earlier u_j and v_j through products that decay with the
distance, M[i, j] = sum_c x_i[c] y_j[c] exp(g_{j+1}[c] + ... + g_i[c]): a triangular system (the WY or UT form of Yang
et al. 2024), solved for all chunks at once. What remains from chunk to chunk is linear: S' = E S + Z S + C.

Nothing is divided by a decay: every exponent is a sum of log decays over adjacent steps, not a difference of sums. For
that M is put together from blocks of 1, 2, 4, ... steps: where a block's second half looks back at its first, the decay
is a factor of the one (from the middle on) times one of the other (up to the middle), neither above 1. So exp(-inf)
zeroes the state as an ordinary decay, and decays of -50 a step leave the weak ones beside them exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import state_dtype
from ..steps import document_starts


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
    keys, output_dtype, dtype = q.shape[-1], v.dtype, state_dtype(v.dtype)
    g = v.new_zeros(batch, time, heads, 1) if g is None else g
    q, k, v, a, b, g = (x.to(dtype) for x in (q * scale, k, v, a, b, g))
    if mask is not None:
        q, k, v, a, b, g = (torch.where(mask[..., None, None], x, 0.0) for x in (q, k, v, a, b, g))
    if seq_ids is not None:
        begins = document_starts(seq_ids, mask)[..., None, None]
        b, g = torch.where(begins, 0.0, b), torch.where(begins, -torch.inf, g)

    length = min(64 if g.shape[-1] == 1 else 32, 1 << (time - 1).bit_length())
    q = q.unflatten(2, (heads, -1))
    q, k, v, a, b, g = (_in_chunks(x, length) for x in (q, k, v, a, b, g))
    readers = torch.cat([b[..., None, :], q], dim=-2)  # (B, Hk, N, L, 1 + group, K)
    writers = torch.stack([a, k], dim=-2)
    products = _products(readers, writers, g)
    within = products[..., 0, :, :]  # (B, Hk, N, L, L, 2): of b with a and with k

    from_start, before = _sums(g)
    from_edge = torch.cat([b * before.exp(), within[..., 1] @ v], dim=-1)
    solved = torch.linalg.solve_triangular(-within[..., 0], from_edge, upper=False, unitriangular=True)
    reads, own = solved.split([keys, values], dim=-1)  # u = reads S + own
    to_end = _sums_after(g).exp()
    a_end = (a * to_end).transpose(-1, -2)
    update, add = a_end @ reads, a_end @ own + (k * to_end).transpose(-1, -2) @ v

    state = v.new_zeros(batch, heads, keys, values) if initial_state is None else initial_state.to(dtype)
    left = from_start[..., -1, :, None].exp()
    states = []
    for chunk in range(left.shape[2]):
        states.append(state)
        state = left[:, :, chunk] * state + (update[:, :, chunk] @ state + add[:, :, chunk])
    edges = torch.stack(states, dim=2)

    u = reads @ edges + own
    seen = products[..., 1:, :, :].flatten(-4, -3)  # (B, Hk, N, L * group, L, 2)
    o = (q * from_start.exp()[..., None, :]).flatten(-3, -2) @ edges + seen[..., 0] @ u + seen[..., 1] @ v
    o = o.unflatten(-2, (length, -1)).flatten(2, 3)[:, :, :time].transpose(1, 2).flatten(2, 3)
    if mask is not None:
        o = torch.where(mask[..., None, None], o, 0.0)
    return o.to(output_dtype), state


def _in_chunks(x: Tensor, length: int) -> Tensor:
    """(B, T, Hk, ...) -> (B, Hk, N, L, ...); the steps that are appended change nothing."""
    x = x.transpose(1, 2)
    x = F.pad(x, [*[0, 0] * (x.ndim - 3), 0, -x.shape[2] % length])
    return x.unflatten(2, (-1, length))


def _sums(g: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of g (..., L, K) up to each step, and up to the one before it."""
    total = g.cumsum(-2)
    return total, F.pad(total[..., :-1, :], (0, 0, 1, 0))


def _sums_after(g: Tensor) -> Tensor:
    """Sums of g (..., L, K) over the steps after each."""
    return F.pad(g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def _products(readers: Tensor, writers: Tensor, g: Tensor) -> Tensor:
    """(..., L, R, L, W): reader r of step i times writer w of step j, decayed; 0 where i cannot see j.

    Args:
        readers: (..., L, R, K); the first of each step reads the state before the step, the others that after it.
        writers: (..., L, W, K).
        g: (..., L, K), or (..., L, 1): then the decays are factored out.
    """
    if g.shape[-1] == readers.shape[-1]:
        return _decayed_products(readers, writers, g)
    ones = torch.ones_like(g[..., None])
    decays = _decayed_products(torch.cat([ones, ones], dim=-2), ones, g)
    decays = torch.cat([decays[..., :1, :, :], decays[..., 1:, :, :].expand(*_sizes(decays, readers))], dim=-3)
    return decays * _pairs(readers, writers)


def _sizes(decays: Tensor, readers: Tensor) -> tuple[int, ...]:
    return *decays.shape[:-3], readers.shape[-2] - 1, *decays.shape[-2:]


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    """(..., I, R, K) and (..., J, W, K) -> (..., I, R, J, W)."""
    products = x.flatten(-3, -2) @ y.flatten(-3, -2).transpose(-1, -2)
    return products.unflatten(-2, (x.shape[-3], x.shape[-2])).unflatten(-1, (y.shape[-3], y.shape[-2]))


def _decayed_products(readers: Tensor, writers: Tensor, g: Tensor) -> Tensor:
    same = _pairs(readers[..., None, 1:, :], writers[..., None, :, :])
    blocks = F.pad(same, (0, 0, 0, 0, 1, 0))  # (..., L, 1, R, 1, W): no step sees itself before it happened
    size = 1
    while size < readers.shape[-3]:
        first, second = g.unflatten(-2, (-1, 2, size)).unbind(-3)
        total, before = _sums(second)
        decay = torch.stack([before, *[total] * (readers.shape[-2] - 1)], dim=-2).exp()
        x = readers.unflatten(-3, (-1, 2, size))[..., 1, :, :, :] * decay
        y = writers.unflatten(-3, (-1, 2, size))[..., 0, :, :, :] * _sums_after(first).exp()[..., None, :]
        back = _pairs(x, y)
        upper, lower = blocks.unflatten(-5, (-1, 2)).unbind(-5)
        blocks = torch.cat(
            [torch.cat([upper, torch.zeros_like(upper)], dim=-2), torch.cat([back, lower], dim=-2)], dim=-4
        )
        size *= 2
    return blocks.squeeze(-5)


@torch.no_grad()
def delta_rule_step(
    *, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    """See `kernels.delta_rule_step`."""
    keep = state if g is None else state * g.to(state.dtype).exp()[..., None]
    k, a, b, values = (x.to(state.dtype) for x in (k, a, b, v))
    u = b[..., None, :] @ state
    state.copy_(keep + a[..., None] * u + k[..., None] * values[..., None, :])
    q = q.to(state.dtype).unflatten(1, (state.shape[1], -1))
    return (scale * (q @ state)).flatten(1, 2).to(v.dtype)
