"""Norms, MLPs, and forget gates whose lower bounds rise over the layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration import RecurrentConfig
from .mixer import Context, SelfInitialised

__all__ = ["MLP", "GroupedNorm", "LowerBounds", "OffsetRMSNorm", "RMSNorm", "make_norm"]


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


class OffsetRMSNorm(RMSNorm, SelfInitialised):
    """(1 + weight) * x / rms(x), the weight starting at 0, as Gemma and RecurrentGemma have it."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        self.init_weights()

    def init_weights(self) -> None:
        init.zeros_(self.weight)

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
            wide = nn.functional.layer_norm(wide, wide.shape[-1:], eps=self.eps)
        else:
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


class LowerBounds(SelfInitialised):
    """Forget gates bounded from below, more tightly the higher the layer (HGRN, Qin et al. 2023, section 3.2).

    f = gamma + (1 - gamma) sigmoid(x), with gamma_l = sum_{0 < j <= l} softmax(logits)_j over the layers, one number a
    channel: 0 in the first layer, below 1 in the last. To be made in `Mixer.shared`.

    Args:
        layers: indices of the layers that are bounded, in order. width: channels of the gates.
    """

    def __init__(self, layers: list[int], width: int):
        super().__init__()
        self.rows = {layer_idx: row for row, layer_idx in enumerate(layers)}
        self.logits = nn.Parameter(torch.zeros(len(layers), width))

    def init_weights(self) -> None:
        init.zeros_(self.logits)

    def bound(self, layer_idx: int, ctx: Context) -> Tensor:
        """gamma of a layer, (width,), float32 (float64 in a float64 model)."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        # With gradients every layer has its own: a checkpointed layer is run again, and must do the same again.
        weights = None if torch.is_grad_enabled() else ctx.memo.get(self)
        if weights is None:
            weights = logits.softmax(0)
            if not torch.is_grad_enabled():
                ctx.memo[self] = weights
        return weights[1 : self.rows[layer_idx] + 1].sum(0)

    def forward(self, x: Tensor, layer_idx: int, ctx: Context) -> tuple[Tensor, Tensor]:
        """Gate logits x (..., width) -> log f and 1 - f of their shape, float32 (float64 for float64)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.rows[layer_idx] == 0:
            return F.logsigmoid(x), torch.sigmoid(-x)
        gamma = self.bound(layer_idx, ctx)
        log_forget = torch.logaddexp(gamma.log(), torch.log1p(-gamma) + F.logsigmoid(x))
        return log_forget, (1 - gamma) * torch.sigmoid(-x)
