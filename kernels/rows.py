"""Rows of keys and values as C reads them (`rows.h`): plain tensors, or packed into few bits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .block_floating_point import Packed
from .native import pointer

__all__ = ["MOST_SINKS", "as_float", "contiguous", "kind", "numbers", "parts", "pointers"]

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # as in rows.h
MOST_SINKS = 128  # PART of rows.h


@lru_cache(maxsize=256)
def numbers(values: tuple[int, ...]) -> Tensor:
    """(n,) int64, the same tensor for the same values: a replay reads its memory."""
    return torch.tensor(values)


def as_float(x: Tensor | None) -> Tensor | None:
    """Contiguous, in float32."""
    return None if x is None else x.to(torch.float32).contiguous()


def parts(rows: Tensor | Packed) -> list[Tensor]:
    """The tensors that rows are made of."""
    return [rows] if isinstance(rows, Tensor) else [rows.codes, rows.exponents]


def contiguous(*rows: Tensor | Packed) -> bool:
    """Whether C can read them."""
    return all(part.is_contiguous() for each in rows for part in parts(each))


def pointers(rows: Tensor | Packed) -> tuple[int | None, int | None]:
    """Addresses of the numbers, or codes, and of the exponents."""
    return (pointer(rows), None) if isinstance(rows, Tensor) else (pointer(rows.codes), pointer(rows.exponents))


def kind(rows: Tensor | Packed) -> int:
    """How C reads them."""
    return KINDS[parts(rows)[0].dtype]
