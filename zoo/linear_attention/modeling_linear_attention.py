"""Linear attention: softmax attention with phi(q) phi(k) in the place of exp(q k), and so a recurrent network.

    phi(x) = elu(x) + 1                                       of q and k, each head by itself
    S_t    = S_{t-1} + phi(k_t)^T v_t                         S in R^{d x d}   (equation 18)
    z_t    = z_{t-1} + phi(k_t)                               z in R^d         (equation 19)
    o_t    = phi(q_t) S_t / (phi(q_t) z_t)                                     (equation 20)

Nothing decays and nothing is rotated: a token counts the same at any distance, and the state is the plain sum of all
that was seen. With `linear_normalizer="rms"` there is no z: o_t = RMSNorm(d^-1/2 phi(q_t) S_t).

B batch, T time, H query heads, Hk key/value heads (a group of query heads reads one state), d head_dim.
Sources: Katharopoulos et al. 2020, "Transformers are RNNs", section 3.4; norm in place of the denominator: Qin et al.
2022, "The devil in linear transformer".
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention import AttentionProjections
from ..core.layers import RMSNorm
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState
from ..core.modeling import model_classes
from ..core.recurrences import linear_attention
from ..core.registry import register_mixer
from .configuration_linear_attention import LinearAttentionConfig

__all__ = [
    "LinearAttentionForCausalLM",
    "LinearAttentionForSequenceClassification",
    "LinearAttentionMixer",
    "LinearAttentionModel",
]


@dataclasses.dataclass
class LinearAttentionState(MixerState):
    """s: (B, Hk, d, d), or (B, Hk, d, d + 1) with z as the last column; float32 (float64 in a float64 model)."""

    s: Tensor


def features(x: Tensor, kind: str) -> Tensor:
    """phi of every channel."""
    if kind == "elu":
        # elu(x) + 1 without the 1 that small weights would be lost beside.
        return x.clamp(max=0).exp() + F.relu(x)
    return F.relu(x) if kind == "relu" else x


@register_mixer("linear_attention")
class LinearAttentionMixer(Mixer):
    """The equations at the head of this file."""

    kernel = "gated_linear_attention"
    paper = "Katharopoulos et al. 2020, arXiv 2006.16236"

    def __init__(self, config: LinearAttentionConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj = AttentionProjections(config)
        self.phi = config.linear_feature_map
        self.norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.linear_normalizer == "rms" else None

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """q, k, v and o take the teacher's places, with biases and norms of q and k.

        Raises:
            ShapeError: the sizes are not the teacher's, or a bias or norm has no place.
        """
        self.proj.load(weights)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LinearAttentionState:
        width = self.proj.head_dim
        shape = (batch, self.proj.num_kv_heads, width, width + int(self.norm is None))
        return LinearAttentionState(torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def forward(self, hidden: Tensor, state: LinearAttentionState | None, ctx: Context):
        q, k, v = self.proj.split(hidden)
        q, k = features(q, self.phi), features(k, self.phi)
        o, s = linear_attention(q, k, v, None, None if state is None else state.s, ctx, normalize=self.norm is None)
        o = o if self.norm is None else self.norm(o).to(o.dtype)
        return self.proj.o_proj(o.flatten(-2)), None if state is None else LinearAttentionState(s)


LinearAttentionModel, LinearAttentionForCausalLM, LinearAttentionForSequenceClassification = model_classes(
    LinearAttentionConfig
)
