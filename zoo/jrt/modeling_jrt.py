"""JRT-RNN: prefix linear attention. Every token of a document sees all of its prefix, through projections of its own.

    o_i = phi(q_i) (sum_{j<=i} phi(k_j)^T v_j + sum_{j in P} phi(k'_j)^T v'_j)
          / phi(q_i) (sum_{j<=i} phi(k_j)     + sum_{j in P} phi(k'_j))                 "JRT-RNN", section 4
    k', v' = x W_k', x W_v'                     of the tokens of the prefix P; phi is Based's Taylor series

A causal state must decide what to keep before it knows what will be asked. Here the prompt has been read once before
its first token is processed, so what is asked at its end counts at its beginning. After the prompt, decoding is that of
any linear attention: the encoder's sums are part of the state. The model's argument `prefix_mask` (B, T) says which
tokens are the prefix of their document: in training the region that is read in both directions, in generation the
prompt. Without it the layer is Based's, and the encoder's projections are not used.

The second reading is done by the same recurrence: before each document its prefix's k' and v' are put as steps that
change the state and whose outputs nobody reads.

B batch, T time, E columns that hold a prefix in any row, H query heads, Hk key/value heads, F features, d head_dim.
Source: Arora et al. 2024, "Just read twice: closing the recall gap for recurrent language models".
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..based.modeling_based import taylor_features, taylor_width
from ..core.attention import copy_weight
from ..core.heads import model_classes
from ..core.linear import LinearMixer, MatrixState
from ..core.mixer import AttentionWeights, Context
from ..core.recurrences import linear_attention
from ..core.registry import register_mixer
from .configuration_jrt import JRTConfig


@dataclasses.dataclass
class Interleaved:
    """The steps of a call with a prefix: E columns of the encoder and T of the decoder, document by document.

    Attributes:
        columns: (E,) int64, columns of the call that hold a prefix in any row.
        order: (B, E + T) int64, which of [encoder, decoder] each step is; None: as they stand.
        back: (B, T) int64, steps of the decoder's columns.
        ctx: the context of the steps.
    """

    columns: Tensor
    order: Tensor | None
    back: Tensor | None
    ctx: Context

    @classmethod
    def of(cls, ctx: Context) -> Interleaved:
        prefix = ctx.prefix
        assert prefix is not None
        columns = prefix.any(0).nonzero()[:, 0]
        token = torch.ones_like(prefix) if ctx.mask is None else ctx.mask
        mask, ids, order, back = torch.cat([prefix[:, columns], token], 1), ctx.seq_ids, None, None
        if ids is not None:
            ids, order = torch.cat([ids[:, columns], ids], 1).sort(dim=1, stable=True)
            mask, back = mask.gather(1, order), order.argsort(1)[:, len(columns) :]
        return cls(columns, order, back, dataclasses.replace(ctx, mask=mask, seq_ids=ids, in_place=False))

    def join(self, encoder: Tensor, decoder: Tensor) -> Tensor:
        """(B, E, ...) and (B, T, ...) -> the steps, (B, E + T, ...)."""
        steps = torch.cat([encoder, decoder], 1)
        return steps if self.order is None else _columns(steps, self.order)

    def decoded(self, o: Tensor) -> Tensor:
        """The decoder's part, (B, T, ...), of the steps."""
        return o[:, len(self.columns) :] if self.back is None else _columns(o, self.back)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


@register_mixer("jrt")
class JRTMixer(LinearMixer):
    """The equations at the head of this file."""

    paper = "Arora et al. 2024, arXiv 2407.05483"
    columns = ("prefix_mask",)

    def __init__(self, config: JRTConfig, layer_idx: int):
        width, bias = config.based_feature_dim, config.attention_bias
        super().__init__(config, layer_idx, key_width=width, feature_width=taylor_width(width), normalize=True)
        self.encoder_k_proj = nn.Linear(config.hidden_size, self.proj.k_proj.out_features, bias=bias)
        self.encoder_v_proj = nn.Linear(config.hidden_size, self.proj.v_proj.out_features, bias=bias)

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return taylor_features(q), taylor_features(k)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> None:
        """q, k, v, o take the teacher's places, its k and v the encoder's too, which so reads as the decoder does."""
        super().init_from_attention(weights)
        for name in "kv":
            layer = getattr(self, f"encoder_{name}_proj")
            copy_weight(layer.weight, getattr(weights, name), f"encoder_{name}_proj.weight", None)
            copy_weight(layer.bias, getattr(weights, f"{name}_bias"), f"encoder_{name}_proj.bias", 0.0)

    def encode(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, E, D) -> phi(k') (B, E, Hk, F), v' (B, E, Hk, d)."""
        k, v = self.encoder_k_proj(hidden), self.encoder_v_proj(hidden)
        k = k.unflatten(-1, (self.proj.num_kv_heads, -1))
        if self.proj.k_norm is not None:
            k = self.proj.k_norm(k).to(v.dtype)
        return taylor_features(k), v.unflatten(-1, (self.proj.num_kv_heads, -1))

    def forward(self, hidden: Tensor, state: MatrixState | None, ctx: Context):
        if ctx.prefix is None:
            return super().forward(hidden, state, ctx)
        if "jrt" not in ctx.memo:
            ctx.memo["jrt"] = Interleaved.of(ctx)
        steps = ctx.memo["jrt"]
        q, k, v = self.proj.split(hidden)
        q, k = self.features(q, k, ctx)
        encoder_k, encoder_v = self.encode(hidden[:, steps.columns])
        unread = q.new_zeros(q.shape[0], len(steps.columns), *q.shape[2:])
        q, k, v = steps.join(unread, q), steps.join(encoder_k, k), steps.join(encoder_v, v)
        o, after = linear_attention(q, k, v, None, None if state is None else state.s, steps.ctx, normalize=True)
        y = self.proj.o_proj(self.output(steps.decoded(o), hidden))
        return y, None if state is None else MatrixState(after)


JRTModel, JRTForCausalLM, JRTForSequenceClassification = model_classes(JRTConfig)
