"""Queries, keys and values through short convolutions.

B batch, T time, D hidden_size; H heads of queries, Hk of keys, Hv of values; K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import AttentionProjections
from .configuration import RecurrentConfig
from .mixer import AttentionWeights, Context
from .recurrences import convolve

__all__ = ["ConvolvedProjections", "l2_norm"]


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension; computed in float32, or float64 for float64 input."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class ConvolvedProjections(AttentionProjections):
    """q, k and v, each channel through a causal convolution of `taps` tokens and an activation.

    Args:
        activation: "silu", or "none" for the convolution alone. bias: of the convolution.
    """

    def __init__(
        self,
        config: RecurrentConfig,
        key_width: int,
        value_width: int,
        heads: tuple[int, int, int],
        *,
        taps: int,
        activation: str,
        bias: bool = False,
    ):
        super().__init__(config, key_width, value_width, heads)
        self.widths = [self.num_heads * key_width, self.num_kv_heads * key_width, self.v_heads * value_width]
        self.taps, self.activation = taps, activation
        # Only its parameters are used: the kernel knows about states, documents and padding.
        self.conv1d = nn.Conv1d(sum(self.widths), sum(self.widths), taps, groups=sum(self.widths), bias=bias)

    @torch.no_grad()
    def load(self, weights: AttentionWeights) -> None:
        """Also makes the convolution the identity, so that it hands on the teacher's q, k and v of the same token."""
        super().load(weights)
        self.conv1d.weight.zero_()
        self.conv1d.weight[..., -1] = 1.0
        if self.conv1d.bias is not None:
            self.conv1d.bias.zero_()

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The inputs of the convolution that its next call needs: (B, channels, taps - 1)."""
        return torch.zeros(batch, sum(self.widths), self.taps - 1, device=device, dtype=dtype)

    def forward(self, hidden: Tensor, state: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden (B, T, D) -> q (B, T, H, K), k (B, T, Hk, K), v (B, T, Hv, V), and the state after them."""
        qkv = torch.cat([x.flatten(-2) for x in self.split(hidden)], -1)
        weight, activation = self.conv1d.weight.squeeze(1), None if self.activation == "none" else self.activation
        qkv, state = convolve(qkv, weight, self.conv1d.bias, state, ctx, activation=activation)
        q, k, v = qkv.split(self.widths, -1)
        q, k = q.unflatten(-1, (-1, self.key_width)), k.unflatten(-1, (-1, self.key_width))
        return q, k, v.unflatten(-1, (-1, self.value_width)), state
