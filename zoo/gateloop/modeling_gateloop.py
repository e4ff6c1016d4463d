"""GateLoop: gated linear recurrence with data-controlled complex transitions, in its maximally headed form.

    q, k, v = W_q x, W_k x, W_v x                               real, one number a channel
    a_t     = sigmoid(W_alpha x_t) * exp(i W_beta x_t)          magnitude and phase from the data
    h_t     = a_t * h_{t-1} + k_t * v_t                         h complex
    y_t     = Re(q_t * h_t)
    out     = W_o (GroupNorm(y) * silu(W_g x))

The general form keeps a matrix k^T v per head; with one channel a head, which the author found best and which is all
that a scan needs, it is a number, and the outer product a product. Data-controlled magnitudes are gates; such phases
turn k relative to q by the angles in between: rotary positions that depend on the content. That distinguishes it from
the LRU (transitions constant), RetNet (constant, per head) and GLA (real).

Chosen here: sigmoid for the magnitude and the identity for the phase, as in the paper (the author's later code takes
sigmoid(|z|) and the angle of a complex projection z, so magnitudes of at least 1/2); the norm is of one token, so that
nothing leaks from later ones; blocks normalise before the mixer, as all of the zoo, not after. All matrices start
Xavier-normal, as in the author's code.

B batch, T time, E channels: num_attention_heads * head_dim.
Source: Katsch 2023, "GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling", section 3.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.attention import AttentionProjections
from ..core.heads import model_classes
from ..core.layers import GroupedNorm
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState
from ..core.recurrences import scan
from ..core.registry import register_mixer
from .configuration_gateloop import GateLoopConfig


@dataclasses.dataclass
class GateLoopState(MixerState):
    """h: (B, E) complex64 (complex128 in a float64 model)."""

    h: Tensor


@register_mixer("gateloop")
class GateLoopMixer(Mixer):
    """The equations at the head of this file. Rows of a_proj: W_alpha, then W_beta."""

    kernel = "linear_scan"
    paper = "Katsch 2023, arXiv 2311.01927"
    decay_parameters = ("a_proj",)

    def __init__(self, config: GateLoopConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj = AttentionProjections(config)
        self.inner = self.proj.num_heads * self.proj.head_dim
        self.a_proj = nn.Linear(config.hidden_size, 2 * self.inner, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, self.inner, bias=False)
        groups = config.gateloop_norm_groups
        self.norm = GroupedNorm(self.inner, groups, config.rms_norm_eps, kind="layer", bias=True) if groups else None

    def init_weights(self) -> None:
        proj = self.proj
        for layer in (proj.q_proj, proj.k_proj, proj.v_proj, proj.o_proj, self.a_proj, self.g_proj):
            init.xavier_normal_(layer.weight)

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """q, k, v, o <- the teacher's: products of single channels in place of those of heads. Transitions stay."""
        self.proj.load(weights)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> GateLoopState:
        wide = torch.promote_types(dtype, torch.float32).to_complex()
        return GateLoopState(torch.zeros(batch, self.inner, device=device, dtype=wide))

    def transition(self, hidden: Tensor) -> Tensor:
        """a: (B, T, E) complex, within the unit circle."""
        alpha, beta = self.a_proj(hidden).chunk(2, -1)
        wide = torch.promote_types(alpha.dtype, torch.float32)
        return torch.polar(torch.sigmoid(alpha.to(wide)), beta.to(wide))

    def gated(self, y: Tensor, hidden: Tensor) -> Tensor:
        """GroupNorm(y) * silu(W_g x), in y's dtype."""
        gate = F.silu(self.g_proj(hidden).to(y.dtype))
        return gate * (y if self.norm is None else self.norm(y))

    def forward(self, hidden: Tensor, state: GateLoopState | None, ctx: Context):
        a = self.transition(hidden)
        q, k, v = (x.to(a.real.dtype) for x in self.proj.split(hidden))
        kv = (k * v).repeat_interleave(self.proj.num_heads // self.proj.num_kv_heads, -2).flatten(-2)
        before = None if state is None else state.h
        h, last = scan(a, torch.complex(kv, torch.zeros_like(kv)), before, ctx)
        y = self.gated(q.flatten(-2) * h.real, hidden)
        return self.proj.o_proj(y.to(hidden.dtype)), None if state is None else GateLoopState(last)


GateLoopModel, GateLoopForCausalLM, GateLoopForSequenceClassification = model_classes(GateLoopConfig)
