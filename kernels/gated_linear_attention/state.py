"""The exact window beside the linear state: its arguments, and the rings that carry it from call to call.

B batch, T time, H query heads, Hk key/value heads, D width of the softmax part's keys, K width of the linear part's
features, V value width, R = sum(lengths) ring rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..dtypes import state_dtype

__all__ = [
    "Window",
    "WindowState",
    "final_rings",
    "ring_heads",
    "ring_offsets",
    "ring_positions",
    "ring_slots",
]

# With anchor "absolute" softmax part and linear part are both divided by exp(shift), which cancels. The shift is the
# largest score, so that no weight overflows, but no less than this, so that the linear part does not overflow either.
LOWEST_SHIFT = -60.0


@dataclass
class Window:
    """Exact softmax weights over the last tokens and the first ones, sharing the linear part's denominator.

    Head h weighs the last `lengths[h]` tokens of the document (the current one included) and its first `sinks` tokens
    by softmax of s_tj = scale * wq_t . wk_j, where wq is `q`, or `q_sink` where j is one of the first `sinks` tokens.

    Args:
        q: (B, T, H, D) queries of the softmax part. k: (B, T, Hk, D) its keys.
        lengths: tokens in the window of each key/value head, at least 1.
        sinks: how many first tokens of each document stay exact for ever.
        q_sink: (B, T, H, D) queries used against sinks; None: `q`.
        scale: factor of the scores; None: D**-0.5.
        factor: (H,) positive weight of the softmax part against the linear part; None: 1.
        anchor: "absolute": weights are factor * exp(s) against the linear part's q . k.
            "max": factor * exp(s - max_j s_tj) against q . k (LoLCATs, Zhang et al. 2024).
        ring_features: (B, R, K) linear features of the tokens in the rows of the initial state's rings (which they are,
            `ring_positions` says); the caller computes them again because the rings do not store them. For a call of
            one token also (B, Hk, K), of those that it pushes out, in the rows that `ring_slots` says.
    """

    q: Tensor
    k: Tensor
    lengths: tuple[int, ...]
    sinks: int = 0
    q_sink: Tensor | None = None
    scale: float | None = None
    factor: Tensor | None = None
    anchor: str = "absolute"
    ring_features: Tensor | None = None


@dataclass
class WindowState:
    """What a layer with a window remembers; a fixed number of bytes at any length.

    s: (B, Hk, K, V+1) float32 (float64 for float64 inputs), linear state of the tokens that left the window; its last
        column is the denominator's.
    ring_k: (B, R, D), ring_v: (B, R, V): head h owns lengths[h] rows from offset sum(lengths[:h]); token n of the
        document (valid tokens only, from 0) is in row offset + n % lengths[h].
    sink_k: (B, Hk, sinks, D), sink_v: (B, Hk, sinks, V).
    count: (B,) int64, tokens of the current document so far.
    """

    s: Tensor
    ring_k: Tensor
    ring_v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    count: Tensor

    @classmethod
    def zeros(
        cls,
        batch: int,
        lengths: tuple[int, ...],
        sinks: int,
        key_width: int,
        feature_width: int,
        value_width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> WindowState:
        """The state before the first token. `key_width` is D, `feature_width` K; `dtype` is that of k and v."""
        heads, rows = len(lengths), sum(lengths)
        made = {"dtype": dtype, "device": device}
        return cls(
            s=torch.zeros(batch, heads, feature_width, value_width + 1, dtype=state_dtype(dtype), device=device),
            ring_k=torch.zeros(batch, rows, key_width, **made),
            ring_v=torch.zeros(batch, rows, value_width, **made),
            sink_k=torch.zeros(batch, heads, sinks, key_width, **made),
            sink_v=torch.zeros(batch, heads, sinks, value_width, **made),
            count=torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def select(self, keep: Tensor, other: WindowState) -> WindowState:
        """This state for the rows where `keep` (B,) is True, `other` for the rest."""

        def pick(name: str) -> Tensor:
            mine, theirs = getattr(self, name), getattr(other, name)
            return torch.where(keep.view(-1, *[1] * (mine.ndim - 1)), mine, theirs)

        return replace(self, **{name: pick(name) for name in self.__dataclass_fields__})


def ring_offsets(lengths: tuple[int, ...]) -> list[int]:
    """First ring row of each head."""
    return [sum(lengths[:head]) for head in range(len(lengths))]


def ring_heads(lengths: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """(R,) which head owns each ring row."""
    heads = [head for head, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(heads, device=device)


def ring_positions(count: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(B, R) int64: which token of the document each ring row holds after `count` (B,) tokens; negative: none yet."""
    rows = torch.cat([torch.arange(length, device=count.device) for length in lengths])
    periods = torch.cat([torch.full((length,), length, device=count.device) for length in lengths])
    last = count[:, None] - 1
    return last - torch.remainder(last - rows, periods)


def ring_slots(count: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(B, Hk) int64: the ring row of each head that the next token takes over, after `count` (B,) tokens."""
    periods, offsets = ring_layout(lengths, count.device)
    return torch.remainder(count[:, None], periods) + offsets


@lru_cache(maxsize=256)
def ring_layout(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(Hk,) lengths, and first ring row of each head."""
    with torch.inference_mode(False):  # the tensors are kept and used again outside of it
        return torch.tensor(lengths, device=device), torch.tensor(ring_offsets(lengths), device=device)


def final_rings(
    window: Window, v: Tensor, state: WindowState, last_start: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rings, sinks and count after a call whose valid tokens stand first in each row.

    Args:
        v: (B, T, Hk, V). state: the state before the call.
        last_start: (B,) step of this call at which the last document began, minus the tokens it had before.
        valid: (B,) valid tokens of this call.
    Returns:
        ring_k, ring_v, sink_k, sink_v, count, as in WindowState.
    """
    count = valid - last_start
    batch = torch.arange(v.shape[0], device=v.device)

    def latest(new: Tensor, old: Tensor, token: Tensor, head: Tensor) -> Tensor:
        step = last_start.view(-1, *[1] * (token.ndim - 1)) + token
        rows = batch.view(-1, *[1] * (token.ndim - 1))
        fresh = new[rows, step.clamp(0, new.shape[1] - 1), head]
        kept = torch.where((step >= 0)[..., None], fresh, old)
        filled = (token >= 0) & (token < count.view(-1, *[1] * (token.ndim - 1)))
        return torch.where(filled[..., None], kept, torch.zeros_like(kept))

    held = ring_positions(count, window.lengths)
    owner = ring_heads(window.lengths, v.device)
    first = torch.arange(window.sinks, device=v.device).expand(len(batch), len(window.lengths), -1)
    heads = torch.arange(len(window.lengths), device=v.device)[:, None]
    return (
        latest(window.k, state.ring_k, held, owner),
        latest(v, state.ring_v, held, owner),
        latest(window.k, state.sink_k, first, heads),
        latest(v, state.sink_v, first, heads),
        count,
    )
