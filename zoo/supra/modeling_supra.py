"""SUPRA: linear attention with fixed decay, started from a softmax attention layer.

    phi(x) = ReLU(W x + b)                          one W, b of a layer, for q and k and all heads
    q, k   = rotate(phi(q)), rotate(phi(k))
    S_t    = exp(-s_h) S_{t-1} + k_t^T v_t          S in R^{d x d} per query head, s_h the ALiBi slope of head h
    o_t    = GroupNorm(d^-1/2 q_t S_t)              per head, no affine parameters, in place of a denominator

B batch, T time, D hidden_size, H query heads, Hk kv heads (repeated to H: each query head has its decay), d head_dim.
Sources: Mercat et al. 2024, "Linearizing Large Language Models"; slopes: Press et al. 2022 (ALiBi).
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.attention import AttentionProjections
from ..core.heads import model_classes
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState
from ..core.recurrences import linear_attention, linear_attention_matrix
from ..core.registry import register_mixer
from .configuration_supra import SupraConfig


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head, for any number of heads.

    For a power of two, 2^(-8 i / heads) for i = 1 ... heads; otherwise those of the next lower power of two, followed
    by every other one of the next higher.
    """
    lower = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / lower) for i in range(1, lower + 1)]
    return slopes + [2.0 ** (-4.0 * i / lower) for i in range(1, 2 * (heads - lower), 2)]


@dataclasses.dataclass
class SupraState(MixerState):
    """s: (B, H, d, d), keys by values, float32 (float64 in a float64 model)."""

    s: Tensor


@register_mixer("supra")
class SupraMixer(Mixer):
    """The equations at the head of this file, between the teacher's projections."""

    kernel = "gated_linear_attention"
    rotates = True
    paper = "Mercat et al. 2024, arXiv 2405.06640"

    def __init__(self, config: SupraConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj = AttentionProjections(config)
        self.phi = nn.Linear(config.head_dim, config.head_dim)
        self.slopes = alibi_slopes(config.num_attention_heads)

    def init_weights(self) -> None:
        bound = self.phi.in_features**-0.5
        init.uniform_(self.phi.weight, -bound, bound)
        init.uniform_(self.phi.bias, -bound, bound)

    def init_from_attention(self, weights: AttentionWeights) -> None:
        self.proj.load(weights)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> SupraState:
        width = self.proj.head_dim
        shape = (batch, self.proj.num_heads, width, width)
        return SupraState(torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def _read(self, hidden: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, T, H, d) and the log decay (H,)."""
        q, k, v = self.proj.split(hidden)
        q = ctx.rotary.rotate(F.relu(self.phi(q)), ctx.positions)
        k = ctx.rotary.rotate(F.relu(self.phi(k)), ctx.positions)
        groups = self.proj.num_heads // self.proj.num_kv_heads
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        log_decay = -torch.tensor(self.slopes, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
        return q, k, v, log_decay

    def mixing_matrix(self, hidden: Tensor, ctx: Context) -> Tensor:
        q, k, _, log_decay = self._read(hidden, ctx)
        return linear_attention_matrix(q, k, log_decay, ctx)

    def forward(self, hidden: Tensor, state: SupraState | None, ctx: Context):
        q, k, v, log_decay = self._read(hidden, ctx)
        o, s = linear_attention(q, k, v, log_decay, None if state is None else state.s, ctx)
        o = F.layer_norm(o, o.shape[-1:])
        return self.proj.o_proj(o.flatten(-2)), None if state is None else SupraState(s)


SupraModel, SupraForCausalLM, SupraForSequenceClassification = model_classes(SupraConfig)
