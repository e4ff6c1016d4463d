"""What the generations of RWKV with matrix-valued states (5, 6, 7) share: heads, low-rank functions, the output.

    r_t, k_t, v_t = R x^r_t, K x^k_t, V x^v_t                 of three mixtures of x_t and x_{t-1}
    y_t = O (g_t * (GroupNorm(o_t) + ...))                    o_t read by r_t from the state, g_t a gate

As students of an attention layer, whose projections R, K, V, O then are, they may have key/value heads that several
heads share, biases, norms and rotations of r and k, and a factor d^-1/2 in place of GroupNorm (RADLADS, Goldstein et
al. 2025).

B batch, T time, D hidden_size, H heads, K and d channels of a head's keys and values.
"""

from __future__ import annotations

import dataclasses

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from .attention import AttentionProjections
from .configuration import RecurrentConfig
from .layers import GroupedNorm
from .mixer import Context, Mixer, MixerState
from .rwkv import RWKVConfig, curve, depth, orthogonal_

__all__ = ["HeadedConfig", "HeadedMixer", "HeadedState", "LowRank"]


@strict
class HeadedConfig(RWKVConfig):
    """`RWKVConfig`, and what students of attention have otherwise. Heads are `num_attention_heads` of `head_dim`.

    Args:
        rwkv_group_norm: norm each head's output; False: multiply it by d^-1/2. rwkv_group_eps: epsilon of this norm.
        rwkv_rotate: rotate r and k by their positions.
    """

    rwkv_group_norm: bool = True
    rwkv_group_eps: float = 64e-5
    rwkv_rotate: bool = False


@dataclasses.dataclass
class HeadedState(MixerState):
    """x: (B, D), the last token's. s: (B, H, K, d), float32 (float64 in a float64 model)."""

    x: Tensor
    s: Tensor


class LowRank(nn.Module):
    """up(act(down(x))) + bias. activation: "tanh", "sigmoid" or None."""

    def __init__(self, width: int, rank: int, out: int, activation: str | None, bias: bool = True):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.up(getattr(torch, self.activation)(x) if self.activation else x)


class HeadedMixer(Mixer):
    """Projections and output of a time mixer; the recurrence is the subclass's.

    Args:
        key_width: channels of a head of r and k; None: `config.head_dim`.
    """

    def __init__(self, config: RecurrentConfig, layer_idx: int, key_width: int | None = None):
        super().__init__(config, layer_idx)
        self.rotates = config.rwkv_rotate
        self.proj = proj = AttentionProjections(config, key_width)
        self.heads, self.key_width, self.value_width = proj.num_heads, proj.key_width, proj.value_width
        self.norm = None
        if config.rwkv_group_norm:
            width = self.heads * self.value_width
            self.norm = GroupedNorm(width, self.heads, config.rwkv_group_eps, "layer", bias=True)

    def init_weights(self) -> None:
        """Orthogonal R, K (a tenth of it), V; O at zero; the norm's weight smaller in lower layers."""
        for linear, gain in ((self.proj.q_proj, 1.0), (self.proj.k_proj, 0.1), (self.proj.v_proj, 1.0)):
            orthogonal_(linear.weight, gain)
        if self.config.rwkv_zero_init:
            init.zeros_(self.proj.o_proj.weight)
        if self.norm is not None:
            init.constant_(self.norm.weight, ((1 + self.layer_idx) / self.config.num_hidden_layers) ** 0.7)

    def init_decay_and_bonus(self, decay: Tensor, bonus: Tensor) -> None:
        """RWKV-5's and 6's: over the channels decays rise, in steeper curves in deeper layers, and the bonus falls."""
        from_zero, _ = depth(self.config, self.layer_idx)
        channels, device = bonus.numel(), bonus.device
        init.copy_(decay, curve(channels, -6, 5, 0.7 + 1.3 * from_zero, device).view_as(decay))
        zigzag = ((torch.arange(channels, device=device) + 1) % 3 - 1) * 0.1
        init.copy_(bonus, (curve(channels, from_zero, -from_zero, 1, device) + zigzag).view_as(bonus))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> HeadedState:
        last = torch.zeros(batch, self.config.hidden_size, device=device, dtype=dtype)
        shape = (batch, self.heads, self.key_width, self.value_width)
        return HeadedState(last, torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def read(self, x_r: Tensor, x_k: Tensor, x_v: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """r, k (B, T, H, K) and v (B, T, H, d) of their inputs (B, T, D)."""
        proj, groups = self.proj, self.heads // self.proj.num_kv_heads
        r = proj.q_proj(x_r).unflatten(-1, (-1, self.key_width))
        k = proj.k_proj(x_k).unflatten(-1, (-1, self.key_width))
        v = proj.v_proj(x_v).unflatten(-1, (-1, self.value_width))
        if proj.q_norm is not None and proj.k_norm is not None:
            r, k = proj.q_norm(r).to(v.dtype), proj.k_norm(k).to(v.dtype)
        if self.config.rwkv_rotate:
            r, k = ctx.rotary.rotate(r, ctx.positions), ctx.rotary.rotate(k, ctx.positions)
        # Heads that share keys differ in their decays, so they have states of their own.
        return r, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)

    def write(self, o: Tensor, gate: Tensor, more: Tensor | None = None) -> Tensor:
        """o (B, T, H, d) as it was read, gate (B, T, H * d), more: added after the norm -> (B, T, D)."""
        o = o.flatten(2)
        o = o * self.value_width**-0.5 if self.norm is None else self.norm(o)
        return self.proj.o_proj((o if more is None else o + more.flatten(2)) * gate)
