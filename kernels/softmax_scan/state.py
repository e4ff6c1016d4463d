"""The state of `softmax_scan`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SoftmaxState", "exponent_of", "initial"]


class SoftmaxState(NamedTuple):
    """Numerator and denominator of a weighted average, both divided by exp(maximum).

    Args:
        maximum: (B, H, K) the largest decayed score so far, -inf before the first. numerator: (B, H, V).
        denominator: (B, H, K). K is 1 or V, the last axis of the scores.
    """

    maximum: Tensor
    numerator: Tensor
    denominator: Tensor


def initial(k: Tensor, v: Tensor, state: SoftmaxState | None, dtype: torch.dtype) -> SoftmaxState:
    """`state`, or the empty one, in `dtype`; k and v are (B, T, H, *)."""
    if state is not None:
        return SoftmaxState(*(x.to(dtype) for x in state))
    batch, _, heads, scores = k.shape
    maximum = k.new_full((batch, heads, scores), float("-inf"), dtype=dtype)
    numerator = v.new_zeros(batch, heads, v.shape[3], dtype=dtype)
    return SoftmaxState(maximum, numerator, torch.zeros_like(maximum))


def exponent_of(maximum: Tensor) -> Tensor:
    """The maximum, but a number where it is -inf, so that exp(-inf - it) is 0 and not nan."""
    return torch.where(maximum == float("-inf"), 0.0, maximum)
