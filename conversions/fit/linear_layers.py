"""Weights of linear layers as one matrix: (O, I), with the bias as one more column where there is one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["set_with_bias", "with_bias"]


def with_bias(linear: nn.Linear) -> Tensor:
    """The matrix, a copy in float64."""
    parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
    return torch.cat(parts, 1).double()


def set_with_bias(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight.copy_(weight[:, : linear.in_features])
    if linear.bias is not None:
        linear.bias.copy_(weight[:, -1])
