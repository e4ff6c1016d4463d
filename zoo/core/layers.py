"""Norms and MLPs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration import RecurrentConfig

__all__ = ["MLP", "GroupedNorm", "OffsetRMSNorm", "RMSNorm", "make_norm"]


class RMSNorm(nn.Module):
    """weight * x / rms(x) over the last dimension; statistics in float32, or float64 for float64 input."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class OffsetRMSNorm(RMSNorm):
    """(1 + weight) * x / rms(x), the weight starting at 0, as Gemma and RecurrentGemma have it."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return ((1 + self.weight.to(wide.dtype)) * wide).to(x.dtype)


class GroupedNorm(nn.Module):
    """Norm of each of `groups` equal parts of the last dimension, then a weight (and bias) for every channel.

    Args:
        kind: "rms", or "layer": the mean is taken out first. affine: False for no weight. bias: also add one.
    """

    def __init__(self, width: int, groups: int, eps: float, kind: str = "rms", affine: bool = True, bias: bool = False):
        super().__init__()
        self.groups, self.eps, self.kind = groups, eps, kind
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.groups, -1))
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        y = wide.flatten(-2).to(x.dtype)
        y = y if self.weight is None else self.weight * y
        return y if self.bias is None else y + self.bias


NORMS = {"rms": RMSNorm, "rms_offset": OffsetRMSNorm, "layer": nn.LayerNorm}


def make_norm(config: RecurrentConfig) -> nn.Module:
    """The norm over hidden_size that the configuration asks for."""
    return NORMS[config.norm_type](config.hidden_size, eps=config.rms_norm_eps)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) or, for mlp_type "plain", down(act(up(x)))."""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias) if config.mlp_type == "gated" else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
