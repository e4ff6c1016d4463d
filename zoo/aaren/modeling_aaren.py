"""Aaren: softmax attention whose query is learned, and so the same at every token.

    q = W_q u                                       u in R^D, learned, one a layer
    k_t, v_t = W_k x_t, W_v x_t
    s_t = d^-1/2 q . k_t                            one score a head
    o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j)
    out = W_o o

What distinguishes it: a token's weight does not depend on who asks, so all prefixes are one scan over (largest score,
numerator, denominator), and a layer's memory is these three. It adds u to an attention layer's parameters and nothing
else. There is no rotation: relative positions would need a query that moves.

B batch, T time, D hidden_size, H query heads, Hk kv heads (repeated to H: each query head has its own scores), d
head_dim.
Source: Feng et al. 2024, "Attention as an RNN", sections 3.1 (the recurrence), 3.2 (the scan) and 3.3 (the module).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ...kernels.softmax_scan.state import SoftmaxState
from ..core.attention import AttentionProjections
from ..core.heads import model_classes
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState
from ..core.recurrences import softmax_average
from ..core.registry import register_mixer
from .configuration_aaren import AarenConfig


@dataclasses.dataclass
class AarenState(MixerState):
    """maximum: (B, H, 1), numerator: (B, H, d), denominator: (B, H, 1), see the kernel's SoftmaxState."""

    maximum: Tensor
    numerator: Tensor
    denominator: Tensor

    def reset_rows(self, rows: Tensor) -> MixerState:
        # A maximum of zero would do, but for scores so far below it that their weights vanish.
        maximum = self.maximum.masked_fill(rows.to(self.maximum.device)[:, None, None], -math.inf)
        return dataclasses.replace(super().reset_rows(rows), maximum=maximum)


@register_mixer("aaren")
class AarenMixer(Mixer):
    """The equations at the head of this file."""

    kernel = "softmax_scan"
    paper = "Feng et al. 2024, arXiv 2405.13956"

    def __init__(self, config: AarenConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj = AttentionProjections(config)
        self.query = nn.Parameter(torch.zeros(config.hidden_size))

    def init_weights(self) -> None:
        init.normal_(self.query, std=1.0)  # as large as the normed tokens, in whose place it stands

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """q, k, v and o take the teacher's places; u, which stands for what its queries were made of, stays."""
        self.proj.load(weights)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> AarenState:
        wide, heads = torch.promote_types(dtype, torch.float32), self.proj.num_heads
        numerator = torch.zeros(batch, heads, self.proj.value_width, device=device, dtype=wide)
        denominator = torch.zeros(batch, heads, 1, device=device, dtype=wide)
        return AarenState(torch.full_like(denominator, -math.inf), numerator, denominator)

    def forward(self, hidden: Tensor, state: AarenState | None, ctx: Context):
        _, k, v = self.proj.split(hidden)
        scores = self._scores(k)
        v = v.repeat_interleave(self.proj.num_heads // self.proj.num_kv_heads, 2)
        before = None if state is None else SoftmaxState(state.maximum, state.numerator, state.denominator)
        o, after = softmax_average(scores, v, before, ctx)
        return self.proj.o_proj(o.flatten(-2)), None if state is None else AarenState(*after)

    def _scores(self, k: Tensor) -> Tensor:
        """k (B, T, Hk, d) -> (B, T, H, 1), float32 (float64 for float64)."""
        # Two rows, and sums instead of products with one vector: the last bit of these depends on where in memory the
        # weights lie, and a loaded model would not give quite the same logits as the saved one.
        q = self.proj.q_proj(self.query.to(k.dtype).expand(2, -1))[0].unflatten(-1, (self.proj.num_heads, -1))
        if self.proj.q_norm is not None:
            q = self.proj.q_norm(q)
        wide = torch.promote_types(k.dtype, torch.float32)
        q = q.to(wide).unflatten(0, (self.proj.num_kv_heads, -1))  # (Hk, H / Hk, d)
        scores = (k.to(wide).unsqueeze(3) * q).sum(-1, keepdim=True) * k.shape[-1] ** -0.5
        return scores.flatten(2, 3)


AarenModel, AarenForCausalLM, AarenForSequenceClassification = model_classes(AarenConfig)
