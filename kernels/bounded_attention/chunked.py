"""`bounded_attention` in pieces of the text, by torch alone; float64 and any device.

Which token drops out when follows from the scores alone, without gradients (`retention`). What the queries of a piece
see is then one ordinary attention over the tokens that were kept before it and its own, under a mask.

B batch, T time, H query heads, Hk kv heads, P rows of the largest head, S = P + T tokens: those of the state, then new.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_floating_point import rounded_like
from ..dispatch import dispatch
from .state import BoundedState, Bounds, padded, unpadded

PIECE = 128


def bounded_attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    bounds: Bounds,
    q_sink: Tensor | None,
    scale: float,
    initial_state: BoundedState,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, BoundedState]:
    """See `kernels.bounded_attention`."""
    rows, most, time = bounds.rows, max(bounds.rows), q.shape[1]
    score = score.detach().to(torch.bfloat16).transpose(1, 2).float()
    scores = torch.cat([padded(initial_state.score, rows).float(), score], 2)
    call = {"score": scores, "position": padded(initial_state.position, rows), "count": initial_state.count}
    until, held, positions = dispatch("retention", call | {"bounds": bounds, "seq_ids": seq_ids, "mask": mask}, None)
    keys = torch.cat([padded(initial_state.keys(k.dtype), rows), k.transpose(1, 2)], 2)
    values = torch.cat([padded(initial_state.values(v.dtype), rows), v.transpose(1, 2)], 2)
    q = q.transpose(1, 2)
    q_sink = None if q_sink is None else q_sink.transpose(1, 2)
    kept = torch.arange(most, device=q.device).expand(len(q), len(rows), most)
    outputs = []
    for first in range(0, time, PIECE):
        last = min(first + PIECE, time)
        steps = torch.arange(first, last, device=q.device)
        kept = torch.cat([kept, (most + steps).expand(*kept.shape[:2], -1)], 2)
        ends = until.gather(2, kept)
        seen = (kept[:, :, None] - most <= steps[:, None]) & (ends[:, :, None] > steps[:, None])
        place = positions.gather(2, kept)
        if bounds.reach is not None:
            distance = positions[:, :, most + first : most + last, None] - place[:, :, None]
            seen &= (distance < bounds.reach) | (place <= bounds.sinks)[:, :, None]
        seen |= kept[:, :, None] - most == steps[:, None]  # a query sees itself, so that padding gives a finite output
        near, far = (None if x is None else x[:, :, first:last] for x in (q, q_sink))
        index = kept[..., None]
        piece = (x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in (keys, values))
        outputs.append(_attend(near, far, *piece, seen, place <= bounds.sinks, scale))
        order = (ends > last).to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, :most]
        kept = kept.gather(2, order)
    return torch.cat(outputs, 2).transpose(1, 2), _after(keys, values, scores, positions, held, rows, initial_state)


def _attend(q: Tensor, far: Tensor | None, k: Tensor, v: Tensor, seen: Tensor, sink: Tensor, scale: float) -> Tensor:
    """(B, H, T, V) of q (B, H, T, D) over k (B, Hk, M, D) where seen (B, Hk, T, M); far: queries against sinks."""
    if far is not None:  # two queries in one product: [near | far] against [key | 0], and [0 | key] of a sink
        q = torch.cat([q, far], -1)
        zero = k.new_zeros(())
        k = torch.cat([torch.where(sink[..., None], zero, k), torch.where(sink[..., None], k, zero)], -1)
    width, missing = v.shape[-1], k.shape[-1] - v.shape[-1]
    groups = q.shape[1] // k.shape[1]
    o = F.scaled_dot_product_attention(
        q,
        k,
        F.pad(v, (0, missing)) if missing > 0 else v,  # torch's fused attention is for values as wide as keys
        attn_mask=seen.repeat_interleave(groups, 1) if groups > 1 else seen,
        scale=scale,
        enable_gqa=groups > 1,
    )
    return o[..., :width]


def _after(
    k: Tensor, v: Tensor, score: Tensor, position: Tensor, held: Tensor, rows: tuple[int, ...], like: BoundedState
) -> BoundedState:
    """The state that holds tokens `held` (B, Hk, P) of S, -1 for none."""
    there, index = held >= 0, held.clamp(min=0)
    wide = index[..., None]
    kept_k, kept_v = (x.gather(2, wide.expand(-1, -1, -1, x.shape[-1])) * there[..., None] for x in (k, v))
    kept = (kept_k, kept_v, score.gather(2, index) * there, position.gather(2, index) * there)
    # Of the last token's document, padding not counted: the newest token is always kept.
    count = kept[3].amax((1, 2)).to(torch.int64)
    return like.holding(*(unpadded(x, rows) for x in kept), count)


@torch.no_grad()
def retention(
    *, score: Tensor, position: Tensor, count: Tensor, bounds: Bounds, seq_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """How long each token is kept.

    Args:
        score: (B, Hk, S) float32. position: (B, Hk, P), as in the state. count: (B,).
    Returns:
        until (B, Hk, S) int64, the first step whose query does not see the token any more (T: none; 0: there is no
        token), held (B, Hk, P) int64, which token is in each row at the end, -1 for none, and the tokens' positions
        (B, Hk, S) int64.
    """
    batch, heads, total = score.shape
    most, device = position.shape[2], score.device
    time = total - most
    place, number = position.to(torch.int64), torch.arange(most, device=device)
    missing = number >= torch.tensor(bounds.rows, device=device)[:, None]  # rows of larger heads
    recents = torch.tensor(bounds.recents, device=device)[:, None]
    until = torch.full_like(score, time, dtype=torch.int64)
    until[:, :, :most] = torch.where(place > 0, time, 0)
    positions = torch.cat([place, place.new_zeros(batch, heads, time)], 2)
    owner = torch.where(place > 0, number, -1)
    value, count = score[:, :, :most].clone(), count.clone()
    tokens = torch.ones(batch, time, dtype=torch.bool, device=device) if mask is None else mask
    for t in range(time):
        if seq_ids is not None and t:
            begins = seq_ids[:, t] != seq_ids[:, t - 1]
            gone = begins[:, None, None] & (owner >= 0)
            until.scatter_reduce_(2, owner.clamp(min=0), torch.where(gone, t, time), "amin")
            place, owner = place.masked_fill(gone, 0), owner.masked_fill(gone, -1)
            count = count.masked_fill(begins, 0)
        token = tokens[:, t, None]
        count = count + tokens[:, t]
        age = count[:, None, None] - place
        old = (age >= recents) & (place > bounds.sinks)
        cost = value.masked_fill(~old, torch.inf)
        if bounds.reach is not None:
            cost = cost.masked_fill(old & (age >= bounds.reach), torch.finfo(cost.dtype).min)
        cost = cost.masked_fill((place == 0) & ~missing, -torch.inf).masked_fill(missing, torch.inf)
        least = cost == cost.amin(2, keepdim=True)
        order = torch.where(place > 0, place, number)  # the oldest, or the first free row
        row = order.masked_fill(~least, torch.iinfo(order.dtype).max).argmin(2, keepdim=True)
        out = owner.gather(2, row)
        leaves = (out >= 0) & token[..., None]
        ends = torch.where(leaves, t, until.gather(2, out.clamp(min=0)))
        until.scatter_(2, out.clamp(min=0), ends)
        until[:, :, most + t] = torch.where(token, time, t)
        positions[:, :, most + t] = count[:, None]
        for kept, new in ((place, count[:, None, None]), (owner, most + t), (value, score[:, :, most + t, None])):
            kept.scatter_(2, row, torch.where(token[..., None], new, kept.gather(2, row)))
    return until, owner, positions


@torch.no_grad()
def bounded_step(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    state: BoundedState,
    bounds: Bounds,
    q_sink: Tensor | None,
    scale: float,
    backend: str = "chunked",
) -> Tensor:
    """See `kernels.bounded_step`."""
    new = {"q": q, "k": rounded_like(k, state.k), "v": rounded_like(v, state.v), "score": score}
    new = {name: x[:, None] for name, x in new.items()}
    call = {"bounds": bounds, "q_sink": None if q_sink is None else q_sink[:, None], "scale": scale}
    call |= {"initial_state": state, "seq_ids": None, "mask": None}
    o, after = dispatch("bounded_attention", new | call, backend)
    state.copy_(after)
    return o[:, 0]
