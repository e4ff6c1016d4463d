"""Mamba-2, in the parameterisation of its authors' state-spaces code.

    [z | x | B | C | dt] = in_proj(hidden)
    x, B, C = silu(causal depthwise convolution of each channel)
    dt  = softplus(dt + dt_bias), bounded;  A = -exp(A_log)                    one number per head
    S_t = exp(dt A) S_{t-1} + B_t^T (dt x_t);  y_t = C_t S_t + D x_t           S in R^{N x P} per head
    out = out_proj(norm(y * silu(z)))                                          RMS per group of heads

so it is gated linear attention with q = C, k = B, v = dt x and log decay dt A.

B batch, T time, H heads, P channels of a head, G groups (B and C are shared in a group), N state size.
Sources: Dao and Gu 2024, "Transformers are SSMs"; as a student of attention (x <- v, B <- k, C <- q, no rotation):
Wang et al. 2024, "The Mamba in the Llama".
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.attention import copy_weight
from ..core.heads import model_classes
from ..core.layers import RMSNorm
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState, shared_decay
from ..core.recurrences import convolve, linear_attention, linear_attention_matrix
from ..core.registry import register_mixer
from .configuration_mamba2 import Mamba2Config


class GatedRMSNorm(nn.Module):
    """RMS norm per group of `group_width` channels, and the gate silu(z) before or after it."""

    def __init__(self, width: int, group_width: int, eps: float, norm_before_gate: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.group_width, self.eps, self.norm_before_gate = group_width, eps, norm_before_gate

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        value, gate = y.to(wide), F.silu(z.to(wide))
        if not self.norm_before_gate:
            value = value * gate
        grouped = value.unflatten(-1, (-1, self.group_width))
        value = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        if self.norm_before_gate:
            return (self.weight * value * gate).to(y.dtype)
        return self.weight * value.to(y.dtype)


@dataclasses.dataclass
class Mamba2State(MixerState):
    """conv: (B, channels of x, B and C, taps - 1), the last inputs. s: (B, H, N, P), float32 or float64."""

    conv: Tensor
    s: Tensor


@register_mixer("mamba2")
class Mamba2Mixer(Mixer):
    """The equations at the head of this file."""

    kernel = "gated_linear_attention"
    paper = "Dao and Gu 2024, arXiv 2405.21060"
    decay_parameters = ("A_log",)

    def __init__(self, config: Mamba2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.heads, self.head_dim, self.state_size = config.ssm_num_heads, config.ssm_head_dim, config.ssm_state_size
        self.x_heads = config.ssm_kv_heads or self.heads
        self.b_groups = config.ssm_kv_heads or config.ssm_groups
        self.c_groups = config.ssm_groups
        inner = self.heads * self.head_dim
        self.conv_widths = [
            self.x_heads * self.head_dim,
            self.b_groups * self.state_size,
            self.c_groups * self.state_size,
        ]
        channels, taps = sum(self.conv_widths), config.ssm_conv_kernel
        self.in_proj = nn.Linear(config.hidden_size, inner + channels + self.heads, bias=config.attention_bias)
        # Only its parameters are used: the kernel knows about states, documents and padding.
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, bias=config.ssm_conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(inner, inner // self.c_groups, config.rms_norm_eps, config.ssm_norm_before_gate)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_output_bias)
        self.b_norm = RMSNorm(self.state_size, config.rms_norm_eps) if config.qk_norm else None
        self.c_norm = RMSNorm(self.state_size, config.rms_norm_eps) if config.qk_norm else None

    def init_weights(self) -> None:
        config, device = self.config, self.A_log.device
        init.copy_(self.A_log, torch.empty(self.heads, device=device).uniform_(1, 16).log())
        low, high = math.log(config.ssm_time_step_min), math.log(config.ssm_time_step_max)
        dt = torch.empty(self.heads, device=device).uniform_(low, high).exp().clamp(min=config.ssm_time_step_floor)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        init.ones_(self.D)
        bound = config.ssm_conv_kernel**-0.5
        init.uniform_(self.conv1d.weight, -bound, bound)
        if self.conv1d.bias is not None:
            init.uniform_(self.conv1d.bias, -bound, bound)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> None:
        """x <- v, B <- k, C <- q, out_proj <- o, with biases and norms; z, dt, A, D and the convolution stay."""
        rows = [self.heads * self.head_dim, *self.conv_widths, self.heads]
        _, x, b, c, _ = self.in_proj.weight.split(rows)
        biases = [None] * 5 if self.in_proj.bias is None else self.in_proj.bias.split(rows)
        for target, bias, name, ours in zip((x, b, c), biases[1:4], "vkq", "xBC", strict=True):
            copy_weight(target, getattr(weights, name), f"{name} (in_proj's {ours})", None)
            copy_weight(bias, getattr(weights, f"{name}_bias"), f"{name} bias (in_proj's {ours})", 0.0)
        copy_weight(self.out_proj.weight, weights.o, "o (out_proj)", None)
        copy_weight(self.out_proj.bias, weights.o_bias, "o bias (out_proj)", 0.0)
        for norm, name in ((self.b_norm, "k_norm"), (self.c_norm, "q_norm")):
            copy_weight(None if norm is None else norm.weight, getattr(weights, name), name, 1.0)

    @torch.no_grad()
    def set_decay(self, log_decay: Tensor) -> None:
        """By A; dt, which is also the weight of the input, stays."""
        self.A_log.copy_((-shared_decay(log_decay, self.heads) / F.softplus(self.dt_bias)).log())

    def output_projection(self) -> nn.Linear:
        return self.out_proj

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Mamba2State:
        conv = torch.zeros(batch, sum(self.conv_widths), self.config.ssm_conv_kernel - 1, device=device, dtype=dtype)
        shape = (batch, self.heads, self.state_size, self.head_dim)
        return Mamba2State(conv, torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def _inputs(self, hidden: Tensor, state: Mamba2State | None, ctx: Context):
        """z (B, T, H P), x (B, T, H, P), B and C (B, T, H, N), dt (B, T, H, 1), dt A, and the convolution's state."""
        z, xbc, dt = self.in_proj(hidden).split([self.heads * self.head_dim, sum(self.conv_widths), self.heads], -1)
        if self.b_norm is not None:
            xbc = self._norm_bc(xbc)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        xbc, conv = convolve(xbc, weight, bias, None if state is None else state.conv, ctx, activation="silu")
        x, b, c = xbc.split(self.conv_widths, -1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if self.config.ssm_time_step_limit is not None:
            dt = dt.clamp(*self.config.ssm_time_step_limit)
        dt = dt[..., None]
        x, b, c = self._to_heads(x, self.x_heads), self._to_heads(b, self.b_groups), self._to_heads(c, self.c_groups)
        return z, x, b, c, dt, -dt * self.A_log.to(wide).exp()[:, None], conv

    def mixing_matrix(self, hidden: Tensor, ctx: Context) -> Tensor:
        _, _, b, c, dt, log_decay, _ = self._inputs(hidden, None, ctx)
        m = linear_attention_matrix(c, b, log_decay, ctx, scale=1.0) * dt.permute(0, 2, 3, 1).to(c.dtype)
        return m + self.D.to(m.dtype)[:, None, None] * torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)

    def forward(self, hidden: Tensor, state: Mamba2State | None, ctx: Context):
        z, x, b, c, dt, log_decay, conv = self._inputs(hidden, state, ctx)
        before = None if state is None else state.s
        y, s = linear_attention(c, b, (x * dt).to(x.dtype), log_decay, before, ctx, scale=1.0)
        y = (y + x * self.D.to(x.dtype)[:, None]).flatten(-2)
        return self.out_proj(self.norm(y, z)), None if state is None else Mamba2State(conv, s)

    def _to_heads(self, x: Tensor, parts: int) -> Tensor:
        """(B, T, parts * width) -> (B, T, H, width), every part repeated for the heads that share it."""
        x = x.unflatten(-1, (parts, -1))
        return x if parts == self.heads else x.repeat_interleave(self.heads // parts, -2)

    def _norm_bc(self, xbc: Tensor) -> Tensor:
        x, b, c = xbc.split(self.conv_widths, -1)
        b = self.b_norm(b.unflatten(-1, (self.b_groups, -1))).flatten(-2)
        c = self.c_norm(c.unflatten(-1, (self.c_groups, -1))).flatten(-2)
        return torch.cat([x, b, c], -1)


Mamba2Model, Mamba2ForCausalLM, Mamba2ForSequenceClassification = model_classes(Mamba2Config)
