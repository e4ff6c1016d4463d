"""Hawk's recurrent block, which is Griffin's and RecurrentGemma's too: RG-LRU beside a GELU branch.

    u   = causal depthwise convolution of W_x x + b_x, 4 taps
    r_t = sigmoid(W_a u_t + b_a),  i_t = sigmoid(W_i u_t + b_i)          block-diagonal; equations 1 and 2
    a_t = exp(-8 softplus(Lambda) r_t)                                   equation 3, c = 8
    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * u_t)                  equation 4
    h_0 = i_0 * u_0                                                      first token of a document: factor 1
    out = W_o (h * gelu(W_y x + b_y)) + b_o

The decay is real, per channel, and the recurrence gate r can only move it between its slowest (a = 1: input and decay
shut together) and exp(-8 softplus(Lambda)); sqrt(1 - a^2) keeps h at the input's variance, as gamma does in the LRU,
but for every token. No gate sees h.

Lambda starts where exp(-softplus(Lambda)), the decay of a gate at 1/8, has a square that is uniform between 0.9^2 and
0.999^2 (a ring, as for the LRU; the authors' code, which differs from the paper's text by the power c).

B batch, T time, D hidden_size, E rglru_width, N blocks of the gates.
Sources: De et al. 2024, "Griffin: Mixing Gated Linear Recurrences with Local Attention", section 2.4 and appendix A;
Botev et al. 2024, "RecurrentGemma", for the first token and the initialisation.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..core.attention import copy_weight
from ..core.heads import model_classes
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState, SelfInitialised
from ..core.recurrences import convolve, scan
from ..core.registry import register_mixer
from .configuration_hawk import HawkConfig

# 1 - a^2 below this is taken as this: there the gradient of the root reaches 1000, and without a bound it is infinite.
SMALLEST_SQUARE = 2.5e-7


class RGLRU(SelfInitialised):
    """Gates and decay of the recurrence, (N, E / N, E / N) matrices that multiply from the right."""

    def __init__(self, width: int, blocks: int, init_variance: float):
        super().__init__()
        self.blocks, self.init_variance = blocks, init_variance
        block = width // blocks
        self.recurrent_param = nn.Parameter(torch.zeros(width))
        self.input_gate_weight = nn.Parameter(torch.zeros(blocks, block, block))
        self.input_gate_bias = nn.Parameter(torch.zeros(blocks, block))
        self.recurrent_gate_weight = nn.Parameter(torch.zeros(blocks, block, block))
        self.recurrent_gate_bias = nn.Parameter(torch.zeros(blocks, block))

    def init_weights(self) -> None:
        std = (self.init_variance / self.input_gate_weight.shape[1]) ** 0.5
        for weight, bias in (
            (self.input_gate_weight, self.input_gate_bias),
            (self.recurrent_gate_weight, self.recurrent_gate_bias),
        ):
            init.normal_(weight, std=std)
            init.zeros_(bias)
        square = torch.empty_like(self.recurrent_param, dtype=torch.float32).uniform_(0.9**2, 0.999**2)
        init.copy_(self.recurrent_param, torch.log(torch.expm1(-0.5 * square.log())))  # softplus inverted

    def gate(self, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """sigmoid(u W + b), block by block: (B, T, E), float32 or float64."""
        by_block = u.reshape(-1, self.blocks, weight.shape[1]).transpose(0, 1)  # (N, B T, E / N)
        logits = torch.baddbmm(bias[:, None], by_block, weight).transpose(0, 1).reshape(u.shape)
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def forward(self, u: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, T, E) and whether a token is its document's first (B or 1, T) -> factors a and inputs of the scan."""
        gated = self.gate(u, self.input_gate_weight, self.input_gate_bias) * u
        recurrence_gate = self.gate(u, self.recurrent_gate_weight, self.recurrent_gate_bias)
        log_a = -8.0 * F.softplus(self.recurrent_param.to(recurrence_gate.dtype)) * recurrence_gate
        scale = (-torch.expm1(2 * log_a)).clamp(min=SMALLEST_SQUARE).sqrt()
        return log_a.exp(), torch.where(first[..., None], gated, scale * gated)


@dataclasses.dataclass
class RGLRUState(MixerState):
    """conv: (B, E, taps - 1), the last inputs. h: (B, E), float32 or float64."""

    conv: Tensor
    h: Tensor


@register_mixer("hawk")
class HawkMixer(Mixer):
    """The equations at the head of this file."""

    kernel = "linear_scan"
    paper = "De et al. 2024, arXiv 2402.19427"
    decay_parameters = ("rg_lru.recurrent_",)

    def __init__(self, config: HawkConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        width, self.inner, taps = config.hidden_size, config.rglru_width, config.rglru_conv_kernel
        self.linear_y = nn.Linear(width, self.inner)
        self.linear_x = nn.Linear(width, self.inner)
        self.linear_out = nn.Linear(self.inner, width)
        # Only its parameters are used: the kernel knows about states, documents and padding.
        self.conv_1d = nn.Conv1d(self.inner, self.inner, taps, groups=self.inner)
        self.rg_lru = RGLRU(self.inner, config.rglru_blocks, config.rglru_init_variance)
        self.act = ACT2FN[config.rglru_act]

    def init_weights(self) -> None:
        config = self.config
        init.normal_(self.linear_x.weight, std=config.hidden_size**-0.5)
        init.normal_(self.linear_y.weight, std=config.hidden_size**-0.5)
        init.normal_(self.linear_out.weight, std=(2 / (config.num_hidden_layers * self.inner)) ** 0.5)
        init.normal_(self.conv_1d.weight, std=(config.rglru_init_variance / config.rglru_conv_kernel) ** 0.5)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> None:
        """W_x <- v, repeated for the query heads; W_o <- o; the convolution starts as the identity.

        So every head averages the teacher's values over time; its q and k, with their biases and norms, have no place.
        No published conversion to this block is known to us: this is the choice of MOHAWK (v, o, identity) for it.
        """
        weights = weights.repeated()
        copy_weight(self.linear_x.weight, weights.v, "linear_x.weight", None)
        copy_weight(self.linear_x.bias, weights.v_bias, "linear_x.bias", 0.0)
        copy_weight(self.linear_out.weight, weights.o, "linear_out.weight", None)
        copy_weight(self.linear_out.bias, weights.o_bias, "linear_out.bias", 0.0)
        self.conv_1d.weight.zero_()
        self.conv_1d.weight[..., -1] = 1.0
        self.conv_1d.bias.zero_()

    def output_projection(self) -> nn.Linear:
        return self.linear_out

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> RGLRUState:
        conv = torch.zeros(batch, self.inner, self.config.rglru_conv_kernel - 1, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return RGLRUState(conv, torch.zeros(batch, self.inner, device=device, dtype=wide))

    def forward(self, hidden: Tensor, state: RGLRUState | None, ctx: Context):
        before = None if state is None else state.conv
        weight, bias = self.conv_1d.weight.squeeze(1), self.conv_1d.bias
        u, conv = convolve(self.linear_x(hidden), weight, bias, before, ctx, activation=None)
        a, x = self.rg_lru(u, ctx.positions == 0)
        h, last = scan(a, x, None if state is None else state.h, ctx)
        out = self.linear_out(h.to(hidden.dtype) * self.act(self.linear_y(hidden)))
        return out, None if state is None else RGLRUState(conv, last)


HawkModel, HawkForCausalLM, HawkForSequenceClassification = model_classes(HawkConfig)
