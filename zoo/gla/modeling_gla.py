"""Gated linear attention: a forget gate for every channel of the keys, computed from the token.

    q_t, k_t, v_t = x_t W_Q, x_t W_K, x_t W_V
    alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/tau)                tau = 16, W_1 W_2 of rank 16           section 4.4
    S_t     = diag(alpha_t) S_{t-1} + k_t^T v_t               S in R^{K x V} per head                equation 3
    o_t     = K^-1/2 q_t S_t
    out     = (swish(x W_r) * norm_h(o)) W_O                  the paper has a bias b_r too, FLA none

What is forgotten, and when, is the token's to say, row by row of the state; RetNet's decay is fixed, Mamba-2's is one
number for a head. The exponent 1/tau keeps the gates near 1 at first, so memory starts out long. No rotation and no
denominator; the norm of each head takes care of the scale. Keys are half as wide as values.

B batch, T time, D hidden_size, H query heads, Hk key/value heads (a group of query heads reads one state), K key width,
V value width of a head.
Source: Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.heads import model_classes
from ..core.layers import RMSNorm
from ..core.linear import LinearMixer
from ..core.mixer import shared_decay
from ..core.registry import register_mixer
from .configuration_gla import GLAConfig


@register_mixer("gla")
class GLAMixer(LinearMixer):
    """The equations at the head of this file."""

    paper = "Yang et al. 2023, arXiv 2312.06635"
    decay_parameters = ("forget_down", "forget_up")

    def __init__(self, config: GLAConfig, layer_idx: int):
        super().__init__(config, layer_idx, key_width=config.gla_key_width)
        self.forget_down = nn.Linear(config.hidden_size, config.gla_gate_rank, bias=False)
        self.forget_up = nn.Linear(config.gla_gate_rank, config.num_key_value_heads * config.gla_key_width)
        self.output_gate = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.norm = RMSNorm(config.head_dim, config.rms_norm_eps)  # one weight for all heads

    def log_decay(self, hidden: Tensor) -> Tensor:
        """log alpha, (B, T, Hk, K)."""
        logits = self.forget_up(self.forget_down(hidden)).unflatten(-1, (self.proj.num_kv_heads, -1))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.logsigmoid(wide) / self.config.gla_gate_divisor

    @torch.no_grad()
    def set_decay(self, log_decay: Tensor) -> None:
        log_alpha = self.config.gla_gate_divisor * shared_decay(log_decay, self.proj.num_kv_heads)
        bias = log_alpha - torch.log(-torch.expm1(log_alpha))  # the inverse of logsigmoid
        self.forget_up.bias.copy_(bias.repeat_interleave(self.proj.key_width))

    def output(self, o: Tensor, hidden: Tensor) -> Tensor:
        return self.norm(o).flatten(-2) * F.silu(self.output_gate(hidden))


GLAModel, GLAForCausalLM, GLAForSequenceClassification = model_classes(GLAConfig)
