"""What a layer with a bounded number of tokens remembers, and how its rows are told apart.

B batch, Hk kv heads, D key width, V value width, R rows of all heads together, P rows of the largest head.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch
from torch import Tensor

from ..block_floating_point import Packed, stored_like, unpacked
from ..rows import parts

__all__ = ["BoundedState", "Bounds", "padded", "unpadded"]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How many tokens each kv head keeps.

    Attributes:
        capacities: tokens of each kv head, besides the sinks.
        recents: how many of them are the last ones, the current one included; from 1 to the capacity.
        sinks: first tokens of a document, which stay for ever.
        reach: a token so many steps back, or more, is not seen any more unless it is a sink; None: there is no limit.
    """

    capacities: tuple[int, ...]
    recents: tuple[int, ...]
    sinks: int = 0
    reach: int | None = None

    def __post_init__(self) -> None:
        wrong = [pair for pair in zip(self.capacities, self.recents, strict=True) if not 1 <= pair[1] <= pair[0]]
        if wrong or self.sinks < 0 or (self.reach is not None and self.reach < max(self.recents)):
            raise ValueError(f"recents must lie between 1 and capacities, and reach be no less than they; got {self}.")

    @property
    def rows(self) -> tuple[int, ...]:
        """Of each kv head: its first ones are the sinks."""
        return tuple(capacity + self.sinks for capacity in self.capacities)


@dataclasses.dataclass
class BoundedState:
    """The tokens that are kept: a fixed number of bytes at any length; all zero: nothing seen yet.

    k: (B, R, D), rotated; v: (B, R, V), plain or in few bits. Head h owns `rows[h]` rows from sum(rows[:h]) on, the
    sinks first. score: (B, R) bfloat16. position: (B, R) int32, of the token in its document, from 1; 0: no token.
    count: (B,) int64, tokens of the current document so far.
    """

    k: Tensor | Packed
    v: Tensor | Packed
    score: Tensor
    position: Tensor
    count: Tensor

    @staticmethod
    def zeros(
        batch: int,
        bounds: Bounds,
        key_width: int,
        value_width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        bits: tuple[int, int] | None = None,
    ) -> BoundedState:
        """Before the first token. bits: of keys and values, where they are kept in few; see `block_floating_point`."""
        rows = sum(bounds.rows)
        if bits is None:
            k, v = (torch.zeros(batch, rows, w, dtype=dtype, device=device) for w in (key_width, value_width))
        else:
            widths = zip((key_width, value_width), bits, strict=True)
            k, v = (Packed.zeros(batch, rows, w, bits=number, device=device) for w, number in widths)
        return BoundedState(
            k,
            v,
            torch.zeros(batch, rows, dtype=torch.bfloat16, device=device),
            torch.zeros(batch, rows, dtype=torch.int32, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def keys(self, dtype: torch.dtype) -> Tensor:
        """(B, R, D)."""
        return unpacked(self.k, dtype)

    def values(self, dtype: torch.dtype) -> Tensor:
        """(B, R, V)."""
        return unpacked(self.v, dtype)

    def holding(self, k: Tensor, v: Tensor, score: Tensor, position: Tensor, count: Tensor) -> BoundedState:
        """A state of the same storage with these tokens; k (B, R, D) and so on."""
        return BoundedState(
            stored_like(k, self.k), stored_like(v, self.v), score.to(self.score.dtype), position.to(torch.int32), count
        )

    def copy_(self, other: BoundedState) -> None:
        """Takes the values of a state of the same sizes, in place."""
        for mine, new in zip(_parts(self), _parts(other), strict=True):
            mine.copy_(new)


def _parts(state: BoundedState) -> list[Tensor]:
    return [*parts(state.k), *parts(state.v), state.score, state.position, state.count]


@lru_cache(maxsize=256)
def _places(rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(Hk, P): of each head's rows the place among all R (any where there is none), and which are there."""
    starts = [sum(rows[:h]) for h in range(len(rows))]
    number = torch.arange(max(rows))
    there = number < torch.tensor(rows)[:, None]
    return torch.where(there, number + torch.tensor(starts)[:, None], 0), there


def padded(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """(B, R, ...) -> (B, Hk, P, ...), zeros where a head has no row."""
    places, there = (y.to(x.device) for y in _places(rows))
    found = x[:, places]
    return found * there.view(*there.shape, *[1] * (x.ndim - 2)).to(x.dtype)


def unpadded(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """(B, Hk, P, ...) -> (B, R, ...)."""
    return torch.cat([x[:, h, :count] for h, count in enumerate(rows)], 1)
