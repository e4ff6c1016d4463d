"""Gated linear attention in plain torch with autograd: matrix products within chunks, one state per chunk between them.

Within a chunk of L steps, with G_tj = g_{j+1} + ... + g_t (always <= 0, so no exponential can overflow):

    o_t = scale * ( sum_{j <= t} (q_t * exp(G_tj)) . k_j v_j  +  (q_t * exp(G_t0 + g_0)) S_in )
    S_out = exp(G_{L-1,0} + g_0) * S_in + sum_j (exp(G_{L-1,j}) * k_j)^T v_j

A bonus replaces G_tj by G_{t-1,j}, j < t, and adds the diagonal. Where a document begins, pairs that straddle it are
cut by masks. Time and memory are linear in T.
Sources: GLA (Yang et al. 2024, section 4), Mamba-2 (Dao and Gu 2024, section 6).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import state_dtype

CHUNK = 64
CHUNK_PER_CHANNEL = 16  # the decays of all pairs of steps are formed for every channel


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 with zero gradients where the denominator is 0."""
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence without normaliser; output (B, T, H, V) and state (B, Hk, K, V) in `state_dtype`."""
    dtype = state_dtype(v.dtype)
    batch, time, heads, width = q.shape
    kv_heads = v.shape[2]
    group = heads // kv_heads
    if g is None:
        g = q.new_zeros(1, dtype=dtype)
    g = g.to(dtype)
    g = g.view(1, 1, -1, 1).expand(1, time, -1, 1) if g.ndim == 1 else g
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if mask is not None:
        keep = mask[..., None, None]
        q, k, v, g = (torch.where(keep, x, 0.0) for x in (q, k, v, g))
    if time == 1:
        return _one_step(q, k, v, g, bonus, scale, initial_state)

    length = min(time, CHUNK if g.shape[-1] == 1 else CHUNK_PER_CHANNEL)
    chunks = -(-time // length)

    def split(x: Tensor) -> Tensor:
        """(b, T, h, n) -> (b, h, chunks, length, n); appended steps are zero: no input, no decay."""
        x = F.pad(x, (0, 0, 0, 0, 0, chunks * length - time))
        return x.unflatten(1, (chunks, length)).permute(0, 3, 1, 2, 4)

    q = split(scale * q).unflatten(1, (kv_heads, group)).transpose(2, 3)  # (B, Hk, chunks, group, length, K)
    k, v, g = split(k), split(v), split(g)

    causal = torch.ones(length, length, dtype=torch.bool, device=v.device).tril()
    steps = torch.where(causal.tril(-1)[..., None], g[..., :, None, :], 0.0)
    decay = steps.cumsum(dim=3)  # G_tj: (b, h, chunks, t, j, K or 1)
    to_end = decay[..., -1, :, :]
    from_start = decay[..., :, 0, :] + g[..., :1, :]
    pairs = causal
    if bonus is not None:  # the state is read before this step's decay
        decay, from_start, pairs = decay - steps, from_start - g, causal.tril(-1)
    if resets is None:
        alive = kept = None
    else:
        began = F.pad(resets, (0, chunks * length - time)).unflatten(1, (chunks, length)).cumsum(dim=2)[:, None]
        pairs = pairs & (began[..., :, None] == began[..., None, :])
        alive = (began == 0)[..., None]  # the chunk's first state has survived so far
        kept = (began == began[..., -1:])[..., None]
    weights = decay.masked_fill(~pairs[..., None], -torch.inf).exp()

    if weights.shape[-1] == 1:
        scores = (q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, (group, length)) * weights[..., 0].unsqueeze(3)
    else:
        scores = torch.einsum("bhcgtk,bhctjk->bhcgtj", q, weights * k.unsqueeze(3))
    if bonus is not None:
        current = (q * k.unsqueeze(3)) @ bonus.to(dtype).view(kv_heads, 1, group, width, 1)
        scores = scores + current * torch.eye(length, dtype=dtype, device=v.device)
    written = k * to_end.exp()
    incoming = from_start.exp()
    total = (to_end[..., 0, :] + g[..., 0, :]).exp()[..., None]  # (b, h, chunks, K or 1, 1)
    if alive is not None and kept is not None:
        written, incoming = torch.where(kept, written, 0.0), torch.where(alive, incoming, 0.0)
        total = torch.where(alive[..., -1:, :], total, 0.0)
    updates = written.transpose(-1, -2) @ v
    state = v.new_zeros(()) if initial_state is None else initial_state.to(dtype)
    states = []
    for chunk in range(chunks):
        states.append(state)
        state = total[:, :, chunk] * state + updates[:, :, chunk]
    if initial_state is None:
        states[0] = torch.zeros_like(state)
    within = (q * incoming.unsqueeze(3)).flatten(3, 4), torch.stack(states, dim=2).expand(batch, kv_heads, -1, -1, -1)
    o = torch.bmm(*(x.flatten(0, 2) for x in within))
    o = torch.baddbmm(o, scores.flatten(3, 4).flatten(0, 2), v.flatten(0, 2))
    o = o.view(batch, kv_heads, chunks, group, length, -1).permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)
    return o[:, :time], state


def _one_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, scale: float, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself. Shapes as in `linear_attention` with T = 1, g (b, 1, h, K or 1)."""
    heads, width = q.shape[2:]
    kv_heads = v.shape[2]
    update = k[:, 0, :, :, None] * v[:, 0, :, None, :]
    state = update if before is None else g[:, 0, :, :, None].exp() * before.to(v.dtype) + update
    query = scale * q[:, 0].unflatten(1, (kv_heads, heads // kv_heads))
    if bonus is None:
        o = query @ state
    else:
        o = (query * bonus.to(v.dtype).view(kv_heads, heads // kv_heads, width)) @ update
        if before is not None:
            o = o + query @ before.to(v.dtype)
    return o.flatten(1, 2)[:, None], state


@torch.no_grad()
def gated_linear_attention_step(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    bonus: Tensor | None,
    scale: float,
    normalize: bool,
) -> Tensor:
    """See `kernels.gated_linear_attention_step`."""
    batch, heads = q.shape[:2]
    kv_heads, output_dtype = k.shape[1], v.dtype
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    queries = (scale * q).unflatten(1, (kv_heads, heads // kv_heads))
    o = None
    if bonus is not None:  # the state is read before this step
        current = (queries * bonus.to(state.dtype).unflatten(0, (kv_heads, -1)) * k[:, :, None]).sum(-1, keepdim=True)
        o = queries @ state + current * v[:, :, None]
    if g is not None:
        state.mul_((g if g.ndim > 1 else g[None, :, None]).to(state.dtype).exp()[..., None])
    state.addcmul_(k[..., None], v[:, :, None])
    if o is None:
        o = queries @ state
    o = o.view(batch, heads, -1)
    return (divide(o[..., :-1], o[..., -1:]) if normalize else o).to(output_dtype)
