"""Mamba, in the parameterisation of its authors' state-spaces code.

    [x | z] = in_proj(hidden)
    x = silu(causal depthwise convolution of x)
    [dt' | B | C] = x_proj(x);  dt = softplus(dt_proj(dt'));  A = -exp(A_log)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = h_t C_t + D x_t           h in R^{E x N}
    out = out_proj(y * silu(z))

Every one of the E channels has a step width dt of its own and N state numbers with a decay each; B and C are shared by
all channels. (Mamba-2 has one decay a head, so that the state is a sum of outer products.)

As a student of attention (`mamba_groups`), x <- v, B <- k, C <- q: in_proj is [x | z | B | C | dt'], nothing rotates,
each group of channels has its own B and C, and x and B have `mamba_kv_groups` groups, repeated after the convolution.
The default student has a state of head_dim numbers; groups of 16 channels with 16 numbers are the published models'.

B batch, T time, D hidden_size, E inner width, N state size, R rank of dt, G groups (Gk of x and B).
Sources: Gu and Dao 2023, "Mamba", sections 3.2 (algorithm 2), 3.4 and 3.6; the norms: Zuo et al. 2024, "Falcon Mamba";
students: Wang et al. 2024, "The Mamba in the Llama", algorithm 1.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ...kernels.errors import RnnzooError
from ..core.attention import copy_weight
from ..core.heads import model_classes
from ..core.layers import RMSNorm
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState
from ..core.recurrences import convolve, selective
from ..core.registry import register_mixer
from .configuration_mamba import MambaConfig


@dataclasses.dataclass
class MambaState(MixerState):
    """conv: (B, channels of x, taps - 1), the last inputs. h: (B, E, N), float32 or float64."""

    conv: Tensor
    h: Tensor


class StepWidth(nn.Linear):
    """A linear layer that leaves its bias to the caller, who adds it in float32. Called, and not read, so that what an
    adapter of PEFT adds to it counts."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


@register_mixer("mamba")
class MambaMixer(Mixer):
    """The equations at the head of this file."""

    kernel = "selective_scan"
    paper = "Gu and Dao 2023, arXiv 2312.00752"
    decay_parameters = ("A_log",)

    def __init__(self, config: MambaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        inner, states, rank = config.mamba_inner_size, config.mamba_state_size, config.mamba_dt_rank
        self.grouped = config.mamba_groups is not None
        self.groups = config.mamba_groups or 1
        self.kv_groups = config.mamba_kv_groups or self.groups
        self.x_width = inner // self.groups * self.kv_groups
        self.bc_widths = [rank, self.kv_groups * states, self.groups * states]
        if self.grouped:
            widths = [self.x_width, inner, *self.bc_widths[1:], rank]
            self.in_proj = nn.Linear(config.hidden_size, sum(widths), bias=config.attention_bias)
            self.x_proj = None
        else:
            self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=config.attention_bias)
            self.x_proj = nn.Linear(inner, sum(self.bc_widths), bias=False)
        # Only its parameters are used: the kernel knows about states, documents and padding.
        channels, taps = self.x_width, config.ssm_conv_kernel
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, bias=config.ssm_conv_bias)
        self.dt_proj = StepWidth(rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner, states))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_output_bias)
        normed = self.grouped and config.qk_norm
        self.b_norm = RMSNorm(states, config.rms_norm_eps) if normed else None
        self.c_norm = RMSNorm(states, config.rms_norm_eps) if normed else None

    def init_weights(self) -> None:
        config, device = self.config, self.A_log.device
        inner, states = self.A_log.shape
        # A = -1, -2, ..., -N in every channel (S4D-Real).
        init.copy_(self.A_log, torch.arange(1, states + 1, device=device).float().log().expand(inner, -1))
        init.ones_(self.D)
        low, high = math.log(config.ssm_time_step_min), math.log(config.ssm_time_step_max)
        dt = torch.empty(inner, device=device).uniform_(low, high).exp().clamp(min=config.ssm_time_step_floor)
        init.copy_(self.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        for layer in (self.in_proj, self.x_proj, self.dt_proj):
            if layer is not None:
                init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5)
        bound = config.ssm_conv_kernel**-0.5
        init.uniform_(self.conv1d.weight, -bound, bound)
        if self.conv1d.bias is not None:
            init.uniform_(self.conv1d.bias, -bound, bound)
        residuals = config.num_hidden_layers * (2 if config.intermediate_size else 1)
        bound = (inner * residuals) ** -0.5
        init.uniform_(self.out_proj.weight, -bound, bound)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> None:
        """x <- v, B <- k, C <- q, out_proj <- o, with biases and norms; z, dt, A, D and the convolution stay.

        Raises:
            RnnzooError: a layer without groups.
        """
        if not self.grouped:
            raise RnnzooError(
                "Mamba's one B and C have no room for the teacher's k and q; build the layer with "
                "MambaConfig.student_fields (mamba_groups)."
            )
        rows = [self.x_width, self.D.shape[0], *self.bc_widths[1:], self.bc_widths[0]]
        parts = self.in_proj.weight.split(rows)
        biases = [None] * 5 if self.in_proj.bias is None else self.in_proj.bias.split(rows)
        for i, name, ours in ((0, "v", "x"), (2, "k", "B"), (3, "q", "C")):
            copy_weight(parts[i], getattr(weights, name), f"{name} (in_proj's {ours})", None)
            copy_weight(biases[i], getattr(weights, f"{name}_bias"), f"{name} bias (in_proj's {ours})", 0.0)
        copy_weight(self.out_proj.weight, weights.o, "o (out_proj)", None)
        copy_weight(self.out_proj.bias, weights.o_bias, "o bias (out_proj)", 0.0)
        for norm, name in ((self.b_norm, "k_norm"), (self.c_norm, "q_norm")):
            copy_weight(None if norm is None else norm.weight, getattr(weights, name), name, 1.0)

    def output_projection(self) -> nn.Linear:
        return self.out_proj

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MambaState:
        conv = torch.zeros(batch, self.x_width, self.config.ssm_conv_kernel - 1, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return MambaState(conv, torch.zeros(batch, *self.A_log.shape, device=device, dtype=wide))

    def forward(self, hidden: Tensor, state: MambaState | None, ctx: Context):
        inner, rank = self.D.shape[0], self.bc_widths[0]
        projected = self.in_proj(hidden)
        x, z = projected.split([self.x_width, inner, projected.shape[-1] - self.x_width - inner], -1)[:2]
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x, conv = convolve(x, weight, bias, None if state is None else state.conv, ctx, activation="silu")
        if self.x_proj is None:
            b, c, dt = projected[..., self.x_width + inner :].split([*self.bc_widths[1:], rank], -1)
        else:
            dt, b, c = self.x_proj(x).split(self.bc_widths, -1)
        x, b, c = (
            self._to_groups(x, self.kv_groups),
            self._to_groups(b, self.kv_groups),
            self._to_groups(c, self.groups),
        )
        if self.b_norm is not None:
            b, c = self.b_norm(b).to(x.dtype), self.c_norm(c).to(x.dtype)
        if (eps := self.config.mamba_norm_eps) is not None:
            b, c, dt = (F.rms_norm(part, part.shape[-1:], eps=eps) for part in (b, c, dt))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dt = self.dt_proj(dt).to(wide)
        dt = self._to_groups(F.softplus(dt + self.dt_proj.bias.to(wide)), self.groups)
        y, h = self._scan(x, dt, b, c, None if state is None else state.h, ctx)
        y = self.out_proj(y * F.silu(z))
        return y, None if state is None else MambaState(conv, h)

    def _to_groups(self, x: Tensor, parts: int) -> Tensor:
        """(B, T, parts * width) -> (B, T, G, width), every part repeated for the groups that share it."""
        x = x.unflatten(-1, (parts, -1))
        return x if parts == self.groups else x.repeat_interleave(self.groups // parts, -2)

    def _scan(
        self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, h: Tensor | None, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        """x, dt (B, T, G, E/G), b, c (B, T, G, N) -> y (B, T, E) and the state (B, E, N) after them."""
        a, d = -self.A_log.to(dt.dtype).exp(), self.D.to(dt.dtype)
        if self.groups == 1:
            return selective(x[:, :, 0], dt[:, :, 0], a, b[:, :, 0], c[:, :, 0], d, h, ctx)
        # The kernel has one B and C for all channels of a call, and each group has decays of its own: a call a group.
        ys, states, width = [], [], x.shape[-1]
        for i in range(self.groups):
            own = slice(i * width, (i + 1) * width)
            before = None if h is None else h[:, own]
            y, after = selective(x[:, :, i], dt[:, :, i], a[own], b[:, :, i], c[:, :, i], d[own], before, ctx)
            ys.append(y)
            states.append(after)
        return torch.cat(ys, -1), h if h is not None and ctx.in_place else torch.cat(states, 1)


MambaModel, MambaForCausalLM, MambaForSequenceClassification = model_classes(MambaConfig)
