"""DeltaNet: linear attention that replaces what it has stored under a key, rather than adding to it.

    S_t = (I - beta_t n_t n_t^T) S_{t-1} + beta_t n_t^T v_t        S in R^{K x V} per head
    o_t = W_o RMSNorm(K^-1/2 q_t S_t)                              norm per head

with n_t and q_t of length 1, beta_t = sigmoid(W_b x_t), and q, k and v from short convolutions; all of it in
`core.delta`. One step of gradient descent on |n_t S - v_t|^2 / 2 at learning rate beta_t. What distinguishes it: keys
that are alike do not blur each other as in linear attention, but nothing is ever forgotten unless overwritten. With
beta in (0, 2) a key's component may also change its sign, which makes parity and permutations learnable.

Sources: Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers", section 4.2; Yang et al. 2024,
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length", sections 2.2 and 3.3; beta up to 2: Grazzi
et al. 2024, "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues".
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.delta import DeltaMixer, DeltaSizes
from ..core.heads import model_classes
from ..core.registry import register_mixer
from .configuration_delta_net import DeltaNetConfig


@register_mixer("delta_net")
class DeltaNetMixer(DeltaMixer):
    """The equations at the head of this file."""

    paper = "Yang et al. 2024, arXiv 2406.06484"

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        sizes = DeltaSizes.of(config, "delta")
        super().__init__(config, layer_idx, sizes, beta_limit=2.0 if config.delta_negative_eigenvalues else 1.0)
        width = self.proj.o_proj.in_features
        self.g_proj = nn.Linear(config.hidden_size, width, bias=False) if config.delta_gate else None

    def gate(self, hidden: Tensor) -> Tensor | None:
        return None if self.g_proj is None else self.g_proj(hidden)


DeltaNetModel, DeltaNetForCausalLM, DeltaNetForSequenceClassification = model_classes(DeltaNetConfig)
