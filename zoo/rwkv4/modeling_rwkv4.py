"""RWKV-4: each channel averages its values, weighted by the exponential of its keys and of a decay.

    k_t = K shift(x, m_k);  v_t = V shift(x, m_v);  r_t = R shift(x, m_r)       shift: see core/rwkv.py
    w   = exp(decay) > 0,  u = bonus                                            one number a channel, learned
    wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t})
    o_t = O (sigmoid(r_t) * wkv_t)

An attention-free Transformer (AFT) with time-invariant decay instead of position biases: the weights of the average do
not depend on the query, so that its state is three numbers a channel.

With P temporal perspectives every stream has factors m of its own and shares all else: its channels are heads of the
same average (core/perspectives.py).

B batch, T time, P perspectives (usually one, and then without an axis), D hidden_size, A channels.
Sources: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", equations 11-18 and appendix D for
channel mixing; Dumitru et al. 2024 for the perspectives.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ...kernels.softmax_scan.state import SoftmaxState
from ..core.heads import model_classes
from ..core.mixer import Context, Mixer, MixerState
from ..core.recurrences import softmax_average
from ..core.registry import register_channel_mixer, register_mixer
from ..core.rwkv import ChannelMix, curve, depth, factor_shape, mix, orthogonal_, ramp, shift
from .configuration_rwkv4 import RWKV4Config


@dataclasses.dataclass
class RWKV4State(MixerState):
    """x: (B, P * D), the last token's. maximum, numerator, denominator: (B, P, A), see the kernel's SoftmaxState."""

    x: Tensor
    maximum: Tensor
    numerator: Tensor
    denominator: Tensor

    def reset_rows(self, rows: Tensor) -> MixerState:
        # A maximum of zero would do, but for keys so far below it that their weights vanish.
        maximum = self.maximum.masked_fill(rows.to(self.maximum.device)[:, None, None], -math.inf)
        return dataclasses.replace(super().reset_rows(rows), maximum=maximum)


@register_channel_mixer("rwkv4")
class RWKV4ChannelMix(ChannelMix):
    of_new = True


@register_mixer("rwkv4")
class RWKV4Mixer(Mixer):
    """The equations at the head of this file."""

    kernel = "softmax_scan"
    paper = "Peng et al. 2023, arXiv 2305.13048"

    def __init__(self, config: RWKV4Config, layer_idx: int):
        super().__init__(config, layer_idx)
        shape = factor_shape(config)
        self.perspectives = 1 if len(shape) == 1 else shape[0]
        width, inner = config.hidden_size, config.rwkv4_width
        self.mix_k = nn.Parameter(torch.zeros(shape))
        self.mix_v = nn.Parameter(torch.zeros(shape))
        self.mix_r = nn.Parameter(torch.zeros(shape))
        self.decay = nn.Parameter(torch.zeros(inner))
        self.bonus = nn.Parameter(torch.zeros(inner))
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.receptance = nn.Linear(width, inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)

    def init_weights(self) -> None:
        width, device = self.decay.numel(), self.decay.device
        from_zero, to_zero = depth(self.config, self.layer_idx)
        init.copy_(self.decay, curve(width, -5, 8, 0.7 + 1.3 * from_zero, device))
        zigzag = ((torch.arange(width, device=device) + 1) % 3 - 1) / 2
        init.copy_(self.bonus, math.log(0.3) + zigzag)
        for factor, power, more in (
            (self.mix_k, to_zero, 0.0),
            (self.mix_v, to_zero, 0.3 * from_zero),
            (self.mix_r, to_zero / 2, 0.0),
        ):
            init.copy_(factor, (ramp(factor.shape[-1], power, device) + more).expand_as(factor))
        orthogonal_(self.value.weight)
        if self.config.rwkv_zero_init:
            for linear in (self.key, self.receptance, self.output):
                init.zeros_(linear.weight)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> RWKV4State:
        last = torch.zeros(batch, self.mix_k.numel(), device=device, dtype=dtype)
        shape = (batch, self.perspectives, self.decay.numel())
        zeros = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return RWKV4State(last, torch.full_like(zeros, -math.inf), zeros, zeros.clone())

    def forward(self, hidden: Tensor, state: RWKV4State | None, ctx: Context):
        before, last = shift(hidden, None if state is None else state.x, ctx)
        k = self.key(mix(hidden, before, self.mix_k, True))
        v = self.value(mix(hidden, before, self.mix_v, True))
        r = torch.sigmoid(self.receptance(mix(hidden, before, self.mix_r, True)))
        heads = (self.perspectives, self.decay.numel())
        rows = (*k.shape[:2], *heads)
        wide = torch.promote_types(k.dtype, torch.float32)
        decay = -self.decay.to(wide).exp().expand(heads)
        bonus = self.bonus.to(wide).expand(heads)
        average = None if state is None else SoftmaxState(state.maximum, state.numerator, state.denominator)
        o, average = softmax_average(k.reshape(rows), v.reshape(rows), average, ctx, decay=decay, bonus=bonus)
        return self.output(r * o.view_as(r)), None if state is None else RWKV4State(last, *average)


RWKV4Model, RWKV4ForCausalLM, RWKV4ForSequenceClassification = model_classes(RWKV4Config)
