"""Gated DeltaNet: the delta rule on a state that decays, at a rate of its own for every head and token.

    alpha_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias))                        one number per head, in (0, 1)
    S_t = alpha_t (I - beta_t n_t n_t^T) S_{t-1} + beta_t n_t^T v_t               S in R^{K x V} per head
    o_t = W_o (RMSNorm(K^-1/2 q_t S_t) * silu(W_g x_t))                           norm per head

with n_t and q_t of length 1, beta_t = sigmoid(W_b x_t), and q, k and v from short convolutions (`core.delta`). What
distinguishes it: DeltaNet can replace one memory but not clear many at once, Mamba-2, whose decay this is, the reverse.

Beside it, "gated_delta_net.attention", softmax attention as Qwen3-Next has it in every fourth layer:

    q, k = rotate(norm(W_q x)), rotate(norm(W_k x));  o = W_o (attention(q, k, v) * sigmoid(W_g x))

Sources: Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", sections 3.1 and
3.4; initialisation of the decay: Dao and Gu 2024; the attention: Qwen3-Next 2025, after Qiu et al. 2025, "Gated
Attention for Large Language Models". Decay and gate of a student of attention start at random.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.errors import RnnzooError
from ..core.attention import FullAttention
from ..core.delta import DeltaMixer, DeltaSizes, init_decay
from ..core.heads import model_classes
from ..core.layers import NORMS
from ..core.mixer import AttentionWeights, shared_decay
from ..core.registry import register_mixer
from .configuration_gated_delta_net import GatedDeltaNetConfig


@register_mixer("gated_delta_net")
class GatedDeltaNetMixer(DeltaMixer):
    """The equations at the head of this file."""

    paper = "Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464"
    decay_parameters = ("A_log", "dt_bias", "a_proj")

    def __init__(self, config: GatedDeltaNetConfig, layer_idx: int):
        sizes, limit = DeltaSizes.of(config, "gdn"), 2.0 if config.gdn_negative_eigenvalues else 1.0
        super().__init__(config, layer_idx, sizes, limit, config.gdn_gate_activation)
        self.a_proj = nn.Linear(config.hidden_size, sizes.v_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(sizes.v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(sizes.v_heads))
        width = self.proj.o_proj.in_features
        self.g_proj = nn.Linear(config.hidden_size, width, bias=False) if config.gdn_gate else None

    def init_weights(self) -> None:
        init_decay(self.A_log, self.dt_bias, least=0.01)  # above the source's 0, of which the logarithm is infinite

    def log_decay(self, hidden: Tensor) -> Tensor:
        a = self.a_proj(hidden)
        wide = torch.promote_types(a.dtype, torch.float32)
        return (-self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias.to(wide)))[..., None]

    @torch.no_grad()
    def set_decay(self, log_decay: Tensor) -> None:
        self.A_log.copy_((-shared_decay(log_decay, self.sizes.v_heads) / F.softplus(self.dt_bias)).log())

    def gate(self, hidden: Tensor) -> Tensor | None:
        return None if self.g_proj is None else self.g_proj(hidden)


@register_mixer("gated_delta_net.attention")
class GatedAttention(FullAttention):
    """Softmax attention with norms of q and k, the head outputs times sigmoid(gate_proj(x))."""

    paper = "Qiu et al. 2025, arXiv 2505.06708"

    def __init__(self, config: GatedDeltaNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, self.proj.o_proj.in_features, bias=config.attention_bias)
        norm = NORMS[config.norm_type]
        self.proj.q_norm = norm(self.proj.key_width, eps=config.rms_norm_eps)
        self.proj.k_norm = norm(self.proj.key_width, eps=config.rms_norm_eps)

    def read_out(self, o: Tensor, hidden: Tensor) -> Tensor:
        return self.proj.o_proj(o.flatten(-2) * torch.sigmoid(self.gate_proj(hidden)))

    def init_from_attention(self, weights: AttentionWeights) -> None:
        raise RnnzooError("A 'gated_delta_net.attention' layer cannot be started from attention without its gate.")


GatedDeltaNetModel, GatedDeltaNetForCausalLM, GatedDeltaNetForSequenceClassification = model_classes(
    GatedDeltaNetConfig
)
