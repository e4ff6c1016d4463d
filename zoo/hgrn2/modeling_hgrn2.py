"""HGRN2: gated linear attention whose key is the complement of its forget gate, so that a state never overflows.

    q_t = silu(W_q x_t);  i_t = W_v x_t
    k_t = (1 - gamma_l) sigmoid(W_k x_t);  f_t = 1 - k_t          the forget gate, at least gamma_l in layer l
    S_t = diag(f_t) S_{t-1} + k_t^T i_t                           S in R^{K x V} per head
    o_t = W_o RMSNorm(K^-1/2 q_t S_t)                             one norm over all heads

gamma is learned, 0 in the first layer and rising over the layers, so that upper layers must remember long
(`core.layers.LowerBounds`). It distinguishes HGRN2 from GLA that gate and key are one, at no parameters, and from HGRN
that the state is expanded by an outer product rather than elementwise. W_k is minus the matrix W_f of the source, which
writes f_t = gamma_l + (1 - gamma_l) sigmoid(W_f x_t).

B batch, T time, H query heads, Hk heads of gates and inputs, K key width (the expansion ratio), V value width.
Sources: Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion", section 3; the bounds: Qin et al. 2023
(HGRN), section 3.2. As a student of attention: k <- k, i <- v, q <- q, without rotation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import AttentionProjections
from ..core.heads import model_classes
from ..core.layers import LowerBounds, RMSNorm
from ..core.linear import MatrixState
from ..core.mixer import AttentionWeights, Context, Mixer
from ..core.recurrences import linear_attention
from ..core.registry import register_mixer
from .configuration_hgrn2 import HGRN2Config


@register_mixer("hgrn2")
class HGRN2Mixer(Mixer):
    """The equations at the head of this file."""

    kernel = "gated_linear_attention"
    paper = "Qin et al. 2024, arXiv 2404.07904"

    def __init__(self, config: HGRN2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, kv_heads = config.hgrn2_num_heads, config.hgrn2_kv_heads
        key_dim, value_dim = config.hgrn2_key_dim, config.hgrn2_value_dim
        self.proj = AttentionProjections(config, key_dim, value_dim, (heads, kv_heads, kv_heads))
        self.norm = RMSNorm(heads * value_dim, config.rms_norm_eps)

    @staticmethod
    def shared(config: HGRN2Config) -> nn.Module | None:
        layers = [i for i, kind in enumerate(config.layer_types or ()) if kind == "hgrn2"]
        if not config.hgrn2_lower_bounds or len(layers) < 2:  # the first has none
            return None
        return LowerBounds(layers, config.hgrn2_kv_heads * config.hgrn2_key_dim)

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """W_q <- q, W_k <- k, W_v <- v, W_o <- o: where a teacher's key is large, a token replaces what is stored."""
        self.proj.load(weights)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MatrixState:
        shape = (batch, self.proj.num_kv_heads, self.proj.key_width, self.proj.value_width)
        return MatrixState(torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def forward(self, hidden: Tensor, state: MatrixState | None, ctx: Context):
        q, k, v = self.proj.split(hidden)
        log_forget, key = self._gate(-k.flatten(-2), ctx)
        k, log_forget = key.to(v.dtype).view(k.shape), log_forget.view(k.shape)
        o, s = linear_attention(F.silu(q), k, v, log_forget, None if state is None else state.s, ctx)
        return self.proj.o_proj(self.norm(o.flatten(-2))), None if state is None else MatrixState(s)

    def _gate(self, logits: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """log f and 1 - f."""
        if "hgrn2" in ctx.shared:
            return ctx.shared["hgrn2"](logits, self.layer_idx, ctx)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.logsigmoid(logits), torch.sigmoid(-logits)


HGRN2Model, HGRN2ForCausalLM, HGRN2ForSequenceClassification = model_classes(HGRN2Config)
