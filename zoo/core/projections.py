"""Queries, keys and values of heads that are not the configuration's attention heads, and through short convolutions.

B batch, T time, D hidden_size; H heads of queries, Hk of keys, Hv of values; K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import AttentionProjections
from .configuration import RecurrentConfig
from .layers import RMSNorm
from .mixer import AttentionWeights, Context
from .recurrences import convolve

__all__ = ["ConvolvedProjections", "SizedProjections", "l2_norm"]


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension; computed in float32, or float64 for float64 input."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class SizedProjections(AttentionProjections):
    """`AttentionProjections` with sizes of its own; `load` puts a teacher's matrices where they fit.

    There are as many heads of output, of width V, as of queries or of values, whichever is more.
    """

    def __init__(self, config: RecurrentConfig, q_heads: int, k_heads: int, v_heads: int, key_dim: int, value_dim: int):
        nn.Module.__init__(self)
        self.num_heads, self.num_kv_heads, self.v_heads = q_heads, k_heads, v_heads
        self.head_dim, self.value_dim = key_dim, value_dim
        self.out_heads = max(q_heads, v_heads)
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_heads * key_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, k_heads * key_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, v_heads * value_dim, bias=bias)
        self.o_proj = nn.Linear(self.out_heads * value_dim, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(key_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(key_dim, config.rms_norm_eps) if config.qk_norm else None

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, T, D) -> q (B, T, H, K), k (B, T, Hk, K), v (B, T, Hv, V): normed if configured."""
        q = self.q_proj(hidden).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(hidden).unflatten(-1, (self.v_heads, self.value_dim))
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast the norms' float32 weights would make them wider than v.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return q, k, v


class ConvolvedProjections(SizedProjections):
    """q, k and v, each channel through a causal convolution of `taps` tokens and an activation.

    Args:
        activation: "silu", or "none" for the convolution alone.
    """

    def __init__(self, config: RecurrentConfig, *sizes: int, taps: int, activation: str):
        super().__init__(config, *sizes)
        self.widths = [self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.v_heads * self.value_dim]
        self.taps, self.activation = taps, activation
        # Only its weight is used: the kernel knows about states, documents and padding.
        self.conv1d = nn.Conv1d(sum(self.widths), sum(self.widths), taps, groups=sum(self.widths), bias=False)

    @torch.no_grad()
    def load(self, weights: AttentionWeights) -> None:
        """Also makes the convolution the identity, so that it hands on the teacher's q, k and v of the same token."""
        super().load(weights)
        self.conv1d.weight.zero_()
        self.conv1d.weight[..., -1] = 1.0

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The inputs of the convolution that its next call needs: (B, channels, taps - 1)."""
        return torch.zeros(batch, sum(self.widths), self.taps - 1, device=device, dtype=dtype)

    def forward(self, hidden: Tensor, state: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden (B, T, D) -> q (B, T, H, K), k (B, T, Hk, K), v (B, T, Hv, V), and the state after them."""
        qkv = torch.cat([x.flatten(-2) for x in self.split(hidden)], -1)
        weight, activation = self.conv1d.weight.squeeze(1), None if self.activation == "none" else self.activation
        qkv, state = convolve(qkv, weight, None, state, ctx, activation=activation)
        q, k, v = qkv.split(self.widths, -1)
        q, k = q.unflatten(-1, (-1, self.head_dim)), k.unflatten(-1, (-1, self.head_dim))
        return q, k, v.unflatten(-1, (-1, self.value_dim)), state
