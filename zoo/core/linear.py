"""What the mixers with linear attention between a Transformer's projections have in common.

    q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v
    S_t = diag(exp(g_t)) S_{t-1} + phi(k_t)^T v_t        S in R^{F x V} per head
    o_t = F^-1/2 phi(q_t) S_t                            or divided by the sum of the weights phi(q_t) phi(k_j)
    y_t = output(o_t) W_o

They differ in phi, in the decay g, and in what they make of the outputs of the heads.

B batch, T time, D hidden_size, H query heads, Hk key/value heads, K key width, F feature width (of phi), V value width.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .attention import AttentionProjections
from .configuration import RecurrentConfig
from .mixer import AttentionWeights, Context, Mixer, MixerState
from .recurrences import linear_attention, linear_attention_matrix

__all__ = ["LinearMixer", "MatrixState"]


@dataclasses.dataclass
class MatrixState(MixerState):
    """s: (B, heads with a state, F, V), with the sum of phi(k) as one more column where outputs are divided by it.

    float32, in a float64 model float64.
    """

    s: Tensor


class LinearMixer(Mixer):
    """The equations at the head of this file; an architecture overrides `features`, `log_decay` and `output`.

    Args:
        key_width, value_width: K and V; None: `config.head_dim`. feature_width: F; None: K.
        normalize: divide by the sum of the weights.
        states_per_query_head: every query head has a state of its own, k and v being repeated; else a group of query
            heads reads one.
    """

    kernel = "gated_linear_attention"

    def __init__(
        self,
        config: RecurrentConfig,
        layer_idx: int,
        *,
        key_width: int | None = None,
        value_width: int | None = None,
        feature_width: int | None = None,
        normalize: bool = False,
        states_per_query_head: bool = False,
    ):
        super().__init__(config, layer_idx)
        self.proj = AttentionProjections(config, key_width, value_width)
        self.feature_width = feature_width or self.proj.key_width
        self.normalize = normalize
        self.repeats = self.proj.num_heads // self.proj.num_kv_heads if states_per_query_head else 1

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """phi of q (B, T, H, K) and of k (B, T, Hk, K): (B, T, heads, F)."""
        return q, k

    def log_decay(self, hidden: Tensor) -> Tensor | None:
        """g, as the kernel takes it, of hidden (B, T, D); None for no decay."""

    def output(self, o: Tensor, hidden: Tensor) -> Tensor:
        """What W_o is given, (B, T, H * V), of the heads' outputs o (B, T, H, V)."""
        return o.flatten(-2)

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """W_q, W_k, W_v, W_o <- q, k, v, o, with their biases and norms; all else stays as it is."""
        self.proj.load(weights)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MatrixState:
        columns = self.proj.value_width + int(self.normalize)
        shape = (batch, self.proj.num_kv_heads * self.repeats, self.feature_width, columns)
        return MatrixState(torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def read(self, hidden: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, T, D) -> phi(q) (B, T, H, F), phi(k) (B, T, Hs, F), v (B, T, Hs, V), of Hs heads with a state."""
        q, k, v = self.proj.split(hidden)
        q, k = self.features(q, k, ctx)
        if self.repeats > 1:
            k, v = k.repeat_interleave(self.repeats, 2), v.repeat_interleave(self.repeats, 2)
        return q, k, v

    def mixing_matrix(self, hidden: Tensor, ctx: Context) -> Tensor:
        q, k, _ = self.read(hidden, ctx)
        return linear_attention_matrix(q, k, self.log_decay(hidden), ctx, normalize=self.normalize)

    def forward(self, hidden: Tensor, state: MatrixState | None, ctx: Context):
        q, k, v = self.read(hidden, ctx)
        before = None if state is None else state.s
        o, after = linear_attention(q, k, v, self.log_decay(hidden), before, ctx, normalize=self.normalize)
        y = self.proj.o_proj(self.output(o, hidden))
        return y, None if state is None else MatrixState(after)
