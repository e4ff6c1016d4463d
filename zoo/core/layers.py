"""Norms and MLPs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration import RecurrentConfig

__all__ = ["MLP", "RMSNorm", "make_norm"]


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


def make_norm(config: RecurrentConfig) -> nn.Module:
    """The norm over hidden_size that the configuration asks for."""
    cls = RMSNorm if config.norm_type == "rms" else nn.LayerNorm
    return cls(config.hidden_size, eps=config.rms_norm_eps)


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
