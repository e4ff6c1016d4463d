"""RWKV-7 "Goose": a delta rule whose decay, removal and learning rate are vectors that depend on the data.

    x^i = x_t + mu_i * (x_{t-1} - x_t)                                           for i = r, w, k, v, a, g
    r, k, v = R x^r, K x^k, V x^v
    f_i(x) = up_i act(down_i x) + bias_i                                     low rank; act: tanh in f_w, sigmoid in f_g
    w = exp(-e^{-1/2} sigmoid(f_w(x^w))) in (0.54, 1);  a = sigmoid(f_a(x^a));  g = f_g(x^g)
    v = v + sigmoid(f_v(x^v)) * (v^1 - v)                                        v^1: the first layer's v
    n = k * xi / |k * xi| per head;  k = k * (1 + (a - 1) * alpha)
    S_t = (diag(w) - (a * n)^T n) S_{t-1} + k^T v;  o_t = r S_t                  S in R^{K x d} per head
    y_t = O (g * (GroupNorm(o_t) + (r rho k^T) v))

so the kernel's a, b are -a * n and n. What is removed (n) and what is added (k) are different vectors, and the learning
rate is one number a channel, which DeltaNet has per head. (The authors write S transposed, and k_k, k_a, r_k for xi,
alpha, rho.) v^1 goes from layer to layer as `ctx.carried`; a layer that runs alone takes its own v for it.

As a student of attention (RADLADS): R, K, V, O the teacher's, rotated; d^-1/2 o_t for GroupNorm(o_t); no v^1. At first
no token shift, rho = 0, a = 1/2, g = 1, and decays that do not depend on the data.

B batch, T time, D hidden_size, H heads, K = d channels of a head.
Sources: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", section 4; Goldstein et al. 2025,
"RADLADS", for students.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.mixer import AttentionWeights, Context, shared_decay
from ..core.recurrences import delta
from ..core.registry import register_channel_mixer, register_mixer
from ..core.rwkv import ChannelMix, curve, depth, mix, orthogonal_, ramp, shift
from ..core.rwkv_heads import HeadedMixer, HeadedState, LowRank
from .configuration_rwkv7 import RWKV7Config


@register_channel_mixer("rwkv7")
class RWKV7ChannelMix(ChannelMix):
    gated = False
    power = 4


@register_mixer("rwkv7")
class RWKV7Mixer(HeadedMixer):
    """The equations at the head of this file. Rows of `mix`: mu_r, mu_w, mu_k, mu_v, mu_a, mu_g."""

    kernel = "delta_rule"
    paper = "Peng et al. 2025, arXiv 2503.14456"
    decay_parameters = ("decay.",)

    def __init__(self, config: RWKV7Config, layer_idx: int):
        super().__init__(config, layer_idx)
        width, inner = config.hidden_size, self.heads * self.key_width
        self.mix = nn.Parameter(torch.zeros(6, width))
        self.decay = LowRank(width, config.rwkv7_decay_rank, inner, "tanh")
        self.rate = LowRank(width, config.rwkv7_rate_rank, inner, None)
        self.gate = LowRank(width, config.rwkv7_gate_rank, inner, "sigmoid", bias=False)
        later = config.rwkv7_value_residual and "rwkv7" in config.layer_types[:layer_idx]
        self.share = LowRank(width, config.rwkv7_value_rank, inner, None) if later else None
        self.removal = nn.Parameter(torch.ones(inner))  # xi
        self.replacement = nn.Parameter(torch.ones(inner))  # alpha
        self.bonus = nn.Parameter(torch.zeros(self.heads, self.key_width))  # rho

    def init_weights(self) -> None:
        super().init_weights()
        device, inner = self.mix.device, self.removal.numel()
        from_zero, to_zero = depth(self.config, self.layer_idx)
        powers = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
        init.copy_(self.mix, 1 - torch.stack([ramp(self.mix.shape[1], p * to_zero, device) for p in powers]))
        linear = curve(inner, -0.5, 1, 1, device)
        zigzag = curve(self.key_width, -1, 2, 1, device).repeat(self.heads)
        zigzag = zigzag * zigzag.abs()
        speed = curve(inner, -6, 6, 1 + from_zero**0.3, device)
        self._init_low_rank(self.decay, speed + 0.5 + 2.5 * zigzag)
        self._init_low_rank(self.rate, -0.19 + 0.3 * zigzag + 0.4 * linear)
        self._init_low_rank(self.gate, None)
        if self.share is not None:
            self._init_low_rank(self.share, 0.73 - 0.4 * linear)
        init.copy_(self.removal, 0.71 - 0.1 * linear)
        init.constant_(self.replacement, 1.02)
        init.constant_(self.bonus, -0.04)

    def _init_low_rank(self, function: LowRank, bias: Tensor | None) -> None:
        if self.config.rwkv_zero_init:
            init.zeros_(function.down.weight)
        out, rank = function.up.weight.shape
        orthogonal_(function.up.weight, 0.1 * max(1, rank / out) ** 0.5)
        if bias is not None:
            init.copy_(function.up.bias, bias)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> None:
        """R, K, V, O <- q, k, v, o with biases and norms; see the head of this file for the rest."""
        self.proj.load(weights)
        from_zero, _ = depth(self.config, self.layer_idx)
        speed = curve(self.removal.numel(), -6.5, 5, 0.85 + from_zero**0.5, self.mix.device)
        self.decay.up.bias.copy_(speed)
        for at_zero in (self.mix, self.bonus, self.rate.up.bias, self.decay.down.weight, self.rate.down.weight):
            at_zero.zero_()
        # Half of the sum over the ranks is one, and yet no two of them are alike.
        up = self.gate.up.weight
        up.add_(2 / up.shape[1] - up.mean(1, keepdim=True))
        self.gate.down.weight.zero_()

    @torch.no_grad()
    def set_decay(self, log_decay: Tensor) -> None:
        """At most exp(-1/2) a step, the fastest that there is, but for a thousandth."""
        share = (-shared_decay(log_decay, self.heads) * math.exp(0.5)).clamp(max=0.999)
        self.decay.up.bias.copy_(share.logit().repeat_interleave(self.key_width))

    def forward(self, hidden: Tensor, state: HeadedState | None, ctx: Context):
        before, last = shift(hidden, None if state is None else state.x, ctx)
        x_r, x_w, x_k, x_v, x_a, x_g = (mix(hidden, before, share, False) for share in self.mix)
        r, k, v = self.read(x_r, x_k, x_v, ctx)
        v = self._with_first(v, x_v, ctx)
        wide = torch.promote_types(k.dtype, torch.float32)
        log_decay = -math.exp(-0.5) * torch.sigmoid(self.decay(x_w).to(wide)).view_as(k)
        rate = torch.sigmoid(self.rate(x_a)).view_as(k)
        removal, replacement = self.removal.view_as(self.bonus), self.replacement.view_as(self.bonus)
        n = F.normalize(k.to(wide) * removal, dim=-1).to(k.dtype)
        k = (k * (1 + (rate - 1) * replacement)).to(k.dtype)
        s = None if state is None else state.s
        o, s = delta(r, k, v, -(rate * n), n, log_decay, s, ctx, scale=1.0)
        current = (r * k * self.bonus).sum(-1, keepdim=True) * v
        return self.write(o, self.gate(x_g), current), None if state is None else HeadedState(last, s)

    def _with_first(self, v: Tensor, x_v: Tensor, ctx: Context) -> Tensor:
        """v (B, T, H, d), mixed with the first layer's, which is handed on."""
        if self.config.rwkv7_value_residual and ctx.carried is None:
            ctx.carried = v
        if self.share is None:
            return v
        return v + (torch.sigmoid(self.share(x_v)).view_as(v) * (ctx.carried - v)).to(v.dtype)


RWKV7Model, RWKV7ForCausalLM, RWKV7ForSequenceClassification = model_classes(RWKV7Config)
