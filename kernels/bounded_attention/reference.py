"""`bounded_attention` token by token, as its definition says; the truth for the other backends."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import chunked
from .state import BoundedState, Bounds


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
    rows, outputs, states = bounds.rows, [], []
    for b in range(len(q)):
        past_k, past_v = initial_state.keys(k.dtype)[b], initial_state.values(v.dtype)[b]
        pools: list[list[_Token | None]] = []
        for h in range(len(rows)):
            owned = slice(sum(rows[:h]), sum(rows[: h + 1]))
            kept = zip(
                initial_state.position[b, owned].tolist(),
                initial_state.score[b, owned].tolist(),
                past_k[owned],
                past_v[owned],
                strict=True,
            )
            pools.append([(p, *token) if p else None for p, *token in kept])
        count, read = int(initial_state.count[b]), []
        for t in range(q.shape[1]):
            if seq_ids is not None and t and bool(seq_ids[b, t] != seq_ids[b, t - 1]):
                pools, count = [_empty(size) for size in rows], 0
            if mask is not None and not bool(mask[b, t]):
                read.append(v[b, t].repeat_interleave(q.shape[2] // len(rows), 0))
                continue
            count += 1
            for h, pool in enumerate(pools):
                value = float(score[b, t, h].to(torch.bfloat16))
                pool[_row(pool, count, bounds, h)] = (count, value, k[b, t, h], v[b, t, h])
            far = q if q_sink is None else q_sink
            read.append(_read(q[b, t], far[b, t], pools, count, bounds, scale))
        outputs.append(torch.stack(read))
        states.append((pools, count))
    if not outputs:  # no rows: zeros of the shape that they would have, with gradients
        nothing = (q.sum() + k.sum() + v.sum()) * 0
        return v.new_zeros(*q.shape[:3], v.shape[-1]) + nothing, initial_state
    return torch.stack(outputs), _state(states, initial_state, k, v)


bounded_step = partial(chunked.bounded_step, backend="reference")

_Token = tuple[int, float, Tensor, Tensor]


def _empty(size: int) -> list[_Token | None]:
    return [None] * size


def _row(pool: list[_Token | None], count: int, bounds: Bounds, head: int) -> int:
    """Which row the token of this position takes: a free one, or that of the token which matters least."""
    if None in pool:
        return pool.index(None)
    left = [
        (bounds.reach is None or count - token[0] < bounds.reach, token[1], token[0], row)
        for row, token in enumerate(pool)
        if token is not None and token[0] > bounds.sinks and count - token[0] >= bounds.recents[head]
    ]
    return min(left, key=lambda found: (found[0], found[1] if found[0] else 0, found[2]))[3]


def _read(q: Tensor, far: Tensor, pools: list[list[_Token | None]], count: int, bounds: Bounds, scale: float) -> Tensor:
    """(H, V) of queries q (H, D); far: against sinks."""
    outputs, group = [], len(q) // len(pools)
    for head in range(len(q)):
        logits, values = [], []
        for token in pools[head // group]:
            if token is None:
                continue
            sink = token[0] <= bounds.sinks
            if sink or bounds.reach is None or count - token[0] < bounds.reach:
                logits.append(scale * (far if sink else q)[head] @ token[2])
                values.append(token[3])
        outputs.append(torch.stack(logits).softmax(0) @ torch.stack(values))
    return torch.stack(outputs)


def _state(states: list, like: BoundedState, k: Tensor, v: Tensor) -> BoundedState:
    empty = (0, 0.0, k.new_zeros(k.shape[-1]), v.new_zeros(v.shape[-1]))
    rows = [[token or empty for pool in pools for token in pool] for pools, _ in states]
    keys, values = (torch.stack([torch.stack([token[i] for token in own]) for own in rows]) for i in (2, 3))
    position, score = (torch.tensor([[token[i] for token in own] for own in rows], device=k.device) for i in (0, 1))
    return like.holding(keys, values, score, position, torch.tensor([count for _, count in states], device=k.device))
