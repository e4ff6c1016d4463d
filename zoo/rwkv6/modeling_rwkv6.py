"""RWKV-6 "Finch": RWKV-5 whose decay and token shift depend on the data, both by low-rank functions.

    x^i = x_t + (mu_i + B_i tanh(A_i shift(x, mu_x))) * (x_{t-1} - x_t)             for i = w, k, v, r, g
    r, k, v = R x^r, K x^k, V x^v;  g = silu(G x^g)
    w_t = exp(-exp(decay + D_2 tanh(D_1 x^w))) in (0, 1)                            one number a key channel and step
    o_t = r_t (S_{t-1} + diag(u) k_t^T v_t);  S_t = diag(w_t) S_{t-1} + k_t^T v_t   S in R^{K x d} per head
    y_t = O (g_t * GroupNorm(o_t))

As a student of attention (RADLADS): R, K, V, O the teacher's, rotated; k_t * (1 - w_t) for k_t; d^-1/2 o_t for
GroupNorm(o_t); g = sigmoid(G x^g). At first g = 1/2, u = 1, no token shift, and decays that do not depend on the data.

B batch, T time, D hidden_size, H heads, K and d channels of a head's keys and values.
Sources: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", section 4.2;
Goldstein et al. 2025, "RADLADS", for students.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.mixer import AttentionWeights, Context, shared_decay
from ..core.recurrences import linear_attention
from ..core.registry import register_channel_mixer, register_mixer
from ..core.rwkv import ChannelMix, depth, mix, orthogonal_, ramp, shift
from ..core.rwkv_heads import HeadedMixer, HeadedState, LowRank
from .configuration_rwkv6 import RWKV6Config


@register_channel_mixer("rwkv6")
class RWKV6ChannelMix(ChannelMix):
    power = 3


class DataDependentShift(nn.Module):
    """The five mixtures x^i of the equations above. Rows of `mix`: mu_w, mu_k, mu_v, mu_r, mu_g."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.rank = rank
        self.mix_x = nn.Parameter(torch.zeros(width))
        self.mix = nn.Parameter(torch.zeros(5, width))
        self.down = nn.Linear(width, 5 * rank, bias=False)
        self.up = nn.Parameter(torch.zeros(5, rank, width))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        low = torch.tanh(self.down(mix(x, before, self.mix_x, False))).unflatten(-1, (5, self.rank))
        # (B * T, rank) times (rank, D), five times over
        share = torch.bmm(low.flatten(0, 1).transpose(0, 1), self.up.to(low.dtype)).unflatten(1, x.shape[:2])
        return tuple(mix(x, before, mu + more, False) for mu, more in zip(self.mix, share, strict=True))


@register_mixer("rwkv6")
class RWKV6Mixer(HeadedMixer):
    """The equations at the head of this file."""

    kernel = "gated_linear_attention"
    paper = "Peng et al. 2024, arXiv 2404.05892"
    decay_parameters = ("decay.",)

    def __init__(self, config: RWKV6Config, layer_idx: int):
        super().__init__(config, layer_idx, config.rwkv6_key_width)
        width = config.hidden_size
        self.shift = DataDependentShift(width, config.rwkv6_mix_rank)
        self.decay = LowRank(width, config.rwkv6_decay_rank, self.heads * self.key_width, "tanh")
        self.bonus = nn.Parameter(torch.zeros(self.heads, self.key_width))
        self.gate = nn.Linear(width, self.heads * self.value_width, bias=False)
        self.gate_act = F.silu if config.rwkv6_gate == "silu" else torch.sigmoid

    def init_weights(self) -> None:
        super().init_weights()
        orthogonal_(self.gate.weight, 0.1)
        self.init_decay_and_bonus(self.decay.up.bias, self.bonus)
        from_zero, to_zero = depth(self.config, self.layer_idx)
        whole, half = (ramp(self.shift.mix.shape[1], power, self.bonus.device) for power in (to_zero, to_zero / 2))
        init.copy_(self.shift.mix_x, 1 - whole)
        init.copy_(self.shift.mix, 1 - torch.stack([whole, whole, whole + 0.3 * from_zero, half, half]))
        for down, up in ((self.shift.down.weight, self.shift.up), (self.decay.down.weight, self.decay.up.weight)):
            if self.config.rwkv_zero_init:
                init.zeros_(down)
            init.uniform_(up, -0.01, 0.01)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> None:
        """R, K, V, O <- q, k, v, o with biases and norms; see the head of this file for the rest."""
        self.proj.load(weights)
        for at_zero in (self.shift.mix_x, self.shift.mix, self.shift.down.weight, self.decay.down.weight):
            at_zero.zero_()
        if self.config.rwkv6_gate == "sigmoid":
            self.gate.weight.zero_()
        self.bonus.fill_(1.0)

    @torch.no_grad()
    def set_decay(self, log_decay: Tensor) -> None:
        rate = -shared_decay(log_decay, self.heads)
        self.decay.up.bias.copy_(rate.log().repeat_interleave(self.key_width))

    def forward(self, hidden: Tensor, state: HeadedState | None, ctx: Context):
        before, last = shift(hidden, None if state is None else state.x, ctx)
        x_w, x_k, x_v, x_r, x_g = self.shift(hidden, before)
        r, k, v = self.read(x_r, x_k, x_v, ctx)
        log_decay = -self.decay(x_w).to(torch.promote_types(k.dtype, torch.float32)).exp().view_as(k)
        if self.config.rwkv6_balance:
            k = k * -torch.expm1(log_decay).to(k.dtype)
        s = None if state is None else state.s
        o, s = linear_attention(r, k, v, log_decay, s, ctx, bonus=self.bonus.to(log_decay.dtype), scale=1.0)
        return self.write(o, self.gate_act(self.gate(x_g))), None if state is None else HeadedState(last, s)


RWKV6Model, RWKV6ForCausalLM, RWKV6ForSequenceClassification = model_classes(RWKV6Config)
