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

import torch.nn.functional as F
from torch import Tensor

from ..core.heads import model_classes
from ..core.layers import RMSNorm
from ..core.linear import LinearMixer
from ..core.mixer import Context
from ..core.registry import register_mixer
from .configuration_linear_attention import LinearAttentionConfig


def phi(x: Tensor, kind: str) -> Tensor:
    """The feature of every channel."""
    if kind == "elu":
        # elu(x) + 1 without the 1 that small weights would be lost beside.
        return x.clamp(max=0).exp() + F.relu(x)
    return F.relu(x) if kind == "relu" else x


@register_mixer("linear_attention")
class LinearAttentionMixer(LinearMixer):
    """The equations at the head of this file."""

    paper = "Katharopoulos et al. 2020, arXiv 2006.16236"

    def __init__(self, config: LinearAttentionConfig, layer_idx: int):
        super().__init__(config, layer_idx, normalize=config.linear_normalizer == "sum")
        self.norm = None if self.normalize else RMSNorm(config.head_dim, config.rms_norm_eps)

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        kind = self.config.linear_feature_map
        return phi(q, kind), phi(k, kind)

    def output(self, o: Tensor, hidden: Tensor) -> Tensor:
        return (o if self.norm is None else self.norm(o)).flatten(-2)


LinearAttentionModel, LinearAttentionForCausalLM, LinearAttentionForSequenceClassification = model_classes(
    LinearAttentionConfig
)
