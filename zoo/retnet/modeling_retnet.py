"""RetNet: multi-scale retention, linear attention whose decay is fixed and differs from head to head.

    q_t, k_t = rotate(x_t W_Q), rotate(x_t W_K);  v_t = x_t W_V                      equation 5
    S_t      = gamma_h S_{t-1} + k_t^T v_t;  o_t = d^-1/2 q_t S_t                    equation 6, S in R^{d x v} per head
    gamma_h  = 1 - 2^(-5-h),  h = 0 ... H-1                                          equation 8
    out      = (swish(x W_G) * norm_h(o)) W_O                                        equation 8

The decay does not depend on the text: heads forget with half-lives from 22 tokens up, doubling from head to head, and
the rotation (xPos, whose decaying part is gamma) tells near from far inside them. Values are wider than keys.

The paper's GroupNorm is taken as RMSNorm with a weight, as its authors' code has it (torchscale, without a weight) and
FLA's. It makes the scale of a head's outputs irrelevant, so there is no denominator. Grouped heads of k and v are
repeated, because every query head has its own decay.

B batch, T time, D hidden_size, H heads, d key width of a head, v value width (2 d in the paper).
Source: Sun et al. 2023, "Retentive Network", sections 2.1 and 2.2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.layers import RMSNorm
from ..core.linear import LinearMixer
from ..core.mixer import Context
from ..core.registry import register_mixer
from .configuration_retnet import RetNetConfig


@register_mixer("retnet")
class RetNetMixer(LinearMixer):
    """The equations at the head of this file."""

    rotates = True
    paper = "Sun et al. 2023, arXiv 2307.08621"

    def __init__(self, config: RetNetConfig, layer_idx: int):
        heads, value_width = config.num_attention_heads, round(config.retnet_value_factor * config.head_dim)
        super().__init__(config, layer_idx, value_width=value_width, states_per_query_head=True)
        self.gate = nn.Linear(config.hidden_size, heads * value_width, bias=False)
        self.norm = RMSNorm(value_width, config.rms_norm_eps)  # one weight for all heads
        self.log_decays = [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]

    def init_weights(self) -> None:
        # As in torchscale, whatever `initializer_range`.
        for layer in (self.proj.q_proj, self.proj.k_proj, self.proj.v_proj, self.gate):
            init.xavier_uniform_(layer.weight, gain=2**-2.5)
        init.xavier_uniform_(self.proj.o_proj.weight, gain=2**-1)

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return ctx.rotary.rotate(q, ctx.positions), ctx.rotary.rotate(k, ctx.positions)

    def log_decay(self, hidden: Tensor) -> Tensor:
        return torch.tensor(
            self.log_decays, device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32)
        )

    def output(self, o: Tensor, hidden: Tensor) -> Tensor:
        return self.norm(o).flatten(-2) * F.silu(self.gate(hidden))


RetNetModel, RetNetForCausalLM, RetNetForSequenceClassification = model_classes(RetNetConfig)
