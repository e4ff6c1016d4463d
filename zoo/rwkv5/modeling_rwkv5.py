"""RWKV-5 "Eagle": a matrix-valued state, each of whose rows decays at its own constant rate.

    r, k, v = R shift(x, m_r), K shift(x, m_k), V shift(x, m_v);  g = silu(G shift(x, m_g))     shift: see core/rwkv.py
    w   = exp(-exp(decay)) in (0, 1),  u = bonus                                    one number a key channel, learned
    o_t = r_t (S_{t-1} + diag(u) k_t^T v_t);  S_t = diag(w) S_{t-1} + k_t^T v_t     S in R^{K x d} per head
    y_t = O (g_t * GroupNorm(o_t))

Where RWKV-4 has a normalised average of single channels, this is linear attention: no denominator, but a norm per head
(version 5.2, the one of the paper and the published models). g is the constant -exp(decay) as the kernel's log decay.

B batch, T time, D hidden_size, H heads, K = d channels of a head.
Source: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", section 4.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.mixer import Context
from ..core.recurrences import linear_attention
from ..core.registry import register_channel_mixer, register_mixer
from ..core.rwkv import ChannelMix, depth, mix, orthogonal_, ramp, shift
from ..core.rwkv_heads import HeadedMixer, HeadedState
from .configuration_rwkv5 import RWKV5Config


@register_channel_mixer("rwkv5")
class RWKV5ChannelMix(ChannelMix):
    of_new = True


@register_mixer("rwkv5")
class RWKV5Mixer(HeadedMixer):
    """The equations at the head of this file. Rows of `mix`: m_r, m_k, m_v, m_g."""

    kernel = "gated_linear_attention"
    paper = "Peng et al. 2024, arXiv 2404.05892"

    def __init__(self, config: RWKV5Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mix = nn.Parameter(torch.zeros(4, config.hidden_size))
        self.decay = nn.Parameter(torch.zeros(self.heads, self.key_width))
        self.bonus = nn.Parameter(torch.zeros(self.heads, self.key_width))
        self.gate = nn.Linear(config.hidden_size, self.heads * self.value_width, bias=False)

    def init_weights(self) -> None:
        super().init_weights()
        orthogonal_(self.gate.weight, 0.1)
        self.init_decay_and_bonus(self.decay, self.bonus)
        from_zero, to_zero = depth(self.config, self.layer_idx)
        whole, half = (ramp(self.mix.shape[1], power, self.mix.device) for power in (to_zero, to_zero / 2))
        init.copy_(self.mix, torch.stack([half, whole, whole + 0.3 * from_zero, half]))

    def forward(self, hidden: Tensor, state: HeadedState | None, ctx: Context):
        before, last = shift(hidden, None if state is None else state.x, ctx)
        x_r, x_k, x_v, x_g = (mix(hidden, before, share, True) for share in self.mix)
        r, k, v = self.read(x_r, x_k, x_v, ctx)
        wide = torch.promote_types(k.dtype, torch.float32)
        log_decay = -self.decay.to(wide).exp().expand(k.shape)
        s = None if state is None else state.s
        o, s = linear_attention(r, k, v, log_decay, s, ctx, bonus=self.bonus.to(wide), scale=1.0)
        return self.write(o, F.silu(self.gate(x_g))), None if state is None else HeadedState(last, s)


RWKV5Model, RWKV5ForCausalLM, RWKV5ForSequenceClassification = model_classes(RWKV5Config)
