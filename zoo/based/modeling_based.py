"""Based: linear attention whose weights are the second-order Taylor series of softmax attention's exponential.

    phi(x) phi(y) = 1 + s + s^2 / 2,  s = x y / sqrt(d')                              section 4.1
    [S_t, z_t] = [S_{t-1}, z_{t-1}] + phi(k_t)^T [v_t, 1]                             S in R^{F x d} per head
    o_t = phi(q_t) S_t / (phi(q_t) z_t)

phi(x) = [1, x / d'^(1/4), x_i^2 / sqrt(2 d'), x_i x_j / sqrt(d') for i < j], so F = 1 + d' + d' (d' + 1) / 2: 153 for
d' = 16. (The paper writes all d'^2 products; the two of a pair are equal, and one of them with twice the weight does.)
All weights are at least 1/2, so the denominator is never near 0. No decay and no rotation: large d' recalls more and
costs more memory, and what is near is left to the windows of neighbouring layers.

B batch, T time, H query heads, Hk key/value heads (a group of query heads reads one state), d' feature_dim, d head_dim.
Source: Arora et al. 2024, "Simple linear attention language models balance the recall-throughput tradeoff".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.linear import LinearMixer
from ..core.mixer import Context
from ..core.modeling import model_classes
from ..core.registry import register_mixer
from .configuration_based import BasedConfig

__all__ = [
    "BasedForCausalLM",
    "BasedForSequenceClassification",
    "BasedMixer",
    "BasedModel",
    "taylor_features",
    "taylor_width",
]


def taylor_width(width: int) -> int:
    """Features of a head of `width` channels."""
    return 1 + width + width * (width + 1) // 2


def taylor_features(x: Tensor) -> Tensor:
    """phi of x (..., d'): (..., F), the products diagonal by diagonal."""
    width = x.shape[-1]
    products = [x[..., : width - i] * x[..., i:] for i in range(1, width)]
    squares = x.square() * (2 * width) ** -0.5
    return torch.cat([torch.ones_like(x[..., :1]), x * width**-0.25, squares, *(p * width**-0.5 for p in products)], -1)


@register_mixer("based")
class BasedMixer(LinearMixer):
    """The equations at the head of this file."""

    paper = "Arora et al. 2024, arXiv 2402.18668"

    def __init__(self, config: BasedConfig, layer_idx: int):
        width = config.based_feature_dim
        super().__init__(config, layer_idx, key_width=width, feature_width=taylor_width(width), normalize=True)

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return taylor_features(q), taylor_features(k)


BasedModel, BasedForCausalLM, BasedForSequenceClassification = model_classes(BasedConfig)
