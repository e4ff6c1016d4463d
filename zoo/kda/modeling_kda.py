"""Kimi Delta Attention: the delta rule on a state that decays at a rate of its own for every channel of the key.

    alpha_t = exp(-exp(A_log) softplus(W_f2 W_f1 x_t + dt_bias))                  one number per channel, in (0, 1)
    S_t = (I - beta_t n_t n_t^T) diag(alpha_t) S_{t-1} + beta_t n_t^T v_t         S in R^{K x V} per head
    o_t = W_o (RMSNorm(K^-1/2 q_t S_t) * sigmoid(W_g2 W_g1 x_t))                  norm per head

with n_t and q_t of length 1, beta_t = sigmoid(W_b x_t), and q, k and v from short convolutions (`core.delta`); A_log is
one number per head, W_f2 W_f1 and W_g2 W_g1 are of low rank. What distinguishes it: Gated DeltaNet's decay, one number
for all channels, becomes GLA's, so that some channels of a memory can be kept while others are let go.

Beside it, "kda.attention", the latent attention (MLA) of every fourth layer of Kimi Linear, without rotation:

    c, r = split(W_c x);  c = RMSNorm(c)                          in the cache: `mla_rank` + `mla_shared_dim` channels
    k_h = (U_h c, r);  v_h = V_h c;  q_h = (a_h, b_h) = W_q x     o = W_o (softmax(q_h k_h^T / sqrt(width)) v_h)

computed as one key head and one value head for all queries: q_h k_h^T = (a_h U_h, b_h) (c, r)^T.

Sources: Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture", sections 3 and 4; latent
attention: DeepSeek-AI 2024, DeepSeek-V2, section 2.1. Decay and gate of a student of attention start at random.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.attention import FullAttention
from ..core.delta import DeltaMixer, DeltaSizes, init_decay
from ..core.heads import model_classes
from ..core.layers import RMSNorm
from ..core.mixer import Context, Mixer, SelfInitialised, shared_decay
from ..core.registry import register_mixer
from .configuration_kda import KDAConfig


@register_mixer("kda")
class KDAMixer(DeltaMixer):
    """The equations at the head of this file."""

    paper = "Kimi Team 2025, arXiv 2510.26692"
    decay_parameters = ("A_log", "dt_bias", "f_a_proj", "f_b_proj")

    def __init__(self, config: KDAConfig, layer_idx: int):
        sizes, limit = DeltaSizes.of(config, "kda"), 2.0 if config.kda_negative_eigenvalues else 1.0
        super().__init__(config, layer_idx, sizes, limit, "sigmoid")
        channels, width, rank = sizes.v_heads * sizes.key_dim, self.proj.o_proj.in_features, config.kda_rank
        self.f_a_proj = nn.Linear(config.hidden_size, rank, bias=False)
        self.f_b_proj = nn.Linear(rank, channels, bias=False)
        self.g_a_proj = nn.Linear(config.hidden_size, rank, bias=False)
        self.g_b_proj = nn.Linear(rank, width, bias=config.kda_gate_bias)
        self.A_log = nn.Parameter(torch.zeros(sizes.v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(channels))

    def init_weights(self) -> None:
        init_decay(self.A_log, self.dt_bias, least=1)

    def log_decay(self, hidden: Tensor) -> Tensor:
        f = self.f_b_proj(self.f_a_proj(hidden))
        wide = torch.promote_types(f.dtype, torch.float32)
        rate = F.softplus(f.to(wide) + self.dt_bias.to(wide)).unflatten(-1, (self.sizes.v_heads, -1))
        return -self.A_log.to(wide).exp()[:, None] * rate

    @torch.no_grad()
    def set_decay(self, log_decay: Tensor) -> None:
        """Of the head's mean over its channels, which keep their ratios."""
        rate = F.softplus(self.dt_bias).unflatten(0, (self.sizes.v_heads, -1)).mean(-1)
        self.A_log.copy_((-shared_decay(log_decay, self.sizes.v_heads) / rate).log())

    def gate(self, hidden: Tensor) -> Tensor:
        return self.g_b_proj(self.g_a_proj(hidden))


class LatentProjections(SelfInitialised):
    """q, and one head of keys and of values in the space of the cache, with what `FullAttention` asks of it."""

    def __init__(self, config: KDAConfig):
        super().__init__()
        heads, rank, shared = config.num_attention_heads, config.mla_rank, config.mla_shared_dim
        self.num_kv_heads, self.key_width, self.value_width = 1, rank + shared, rank
        self.key_dim, self.std = config.mla_key_dim, config.initializer_range
        self.q_proj = nn.Linear(config.hidden_size, heads * (self.key_dim + shared), bias=False)
        self.kv_a_proj = nn.Linear(config.hidden_size, rank + shared, bias=False)
        self.kv_a_norm = RMSNorm(rank, eps=1e-6)
        # U and V of every head. Not a linear layer: it is multiplied from either side.
        self.kv_b_weight = nn.Parameter(torch.zeros(heads, self.key_dim + config.mla_value_dim, rank))
        self.o_proj = nn.Linear(heads * config.mla_value_dim, config.hidden_size, bias=False)

    def init_weights(self) -> None:
        init.normal_(self.kv_b_weight, std=self.std)

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, T, D) -> q (B, T, H, rank + shared), k (B, T, 1, rank + shared), v (B, T, 1, rank)."""
        q, compressed = self.q_proj(hidden), self.kv_a_proj(hidden)
        own, shared_q = q.unflatten(-1, (self.kv_b_weight.shape[0], -1)).tensor_split([self.key_dim], -1)
        latent, shared = compressed.tensor_split([self.value_width], -1)
        latent = self.kv_a_norm(latent).to(q.dtype)
        absorbed = torch.einsum("bthn,hnr->bthr", own, self.kv_b_weight[:, : self.key_dim].to(q.dtype))
        # The attention divides by the root of its own width; the definition, by that of the heads' width.
        factor = (self.key_width / (self.key_dim + shared.shape[-1])) ** 0.5
        q = torch.cat([absorbed, shared_q], -1) * factor
        return q, torch.cat([latent, shared], -1)[:, :, None], latent[:, :, None]


@register_mixer("kda.attention")
class LatentAttention(FullAttention):
    """The last equations at the head of this file."""

    rotates = False
    paper = "DeepSeek-AI 2024, arXiv 2405.04434"
    init_from_attention = Mixer.init_from_attention

    def __init__(self, config: KDAConfig, layer_idx: int):
        Mixer.__init__(self, config, layer_idx)
        self.proj = LatentProjections(config)

    def project(self, hidden: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        return self.proj.split(hidden)

    def read_out(self, o: Tensor, hidden: Tensor) -> Tensor:
        values = self.proj.kv_b_weight[:, self.proj.key_dim :].to(o.dtype)
        return self.proj.o_proj(torch.einsum("bthr,hvr->bthv", o, values).flatten(-2))


KDAModel, KDAForCausalLM, KDAForSequenceClassification = model_classes(KDAConfig)
