"""xLSTM with matrix memories: mLSTM layers in the block of xLSTM-7B.

    q, k, v = W_q x, W_k x, W_v x;  i~, f~ = cap(W_i x), cap(W_f x) with cap(a) = c tanh(a / c);  o = sigmoid(W_o x)
    m_t = max(log sigmoid(f~_t) + m_{t-1}, i~_t)                                       the stabiliser, m_0 = 0
    f'  = exp(log sigmoid(f~_t) + m_{t-1} - m_t);  i' = exp(i~_t - m_t)                neither above 1
    C_t = f' C_{t-1} + i' k_t^T v_t;  n_t = f' n_{t-1} + i' k_t                        C in R^{K x V} per head
    h_t = d^-1/2 q_t C_t / (max(|d^-1/2 q_t . n_t|, exp(-m_t)) + eps)
    out = W_out (o * norm(h))                                                          LayerNorm of each head

What distinguishes it from other gated linear attention: the input gate is exponential, so a late token can outweigh all
before it, and the normaliser keeps the output bounded. m cancels in h up to eps (C and n are those without it, times
exp(-m)); it is known before any C, as a scan over the gates alone, and with it the rest is gated linear attention with
keys i' k, log decay log f', and n as one more column of C, that of values that are 1.

B batch, T time, H heads (Hk of k, v and the gates), K key width, V value width.
Sources: Beck et al. 2024, "xLSTM", equations 15-17 (stabiliser) and 19-27; Beck et al. 2025, "xLSTM 7B", sections 2 and
3 (block, caps, initialisation). Scalar-memory sLSTM blocks are not here.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ...kernels.steps import document_starts
from ..core.attention import AttentionProjections
from ..core.heads import model_classes
from ..core.layers import GroupedNorm
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState, shared_decay
from ..core.recurrences import linear_attention
from ..core.registry import register_mixer
from .configuration_xlstm import xLSTMConfig


@dataclasses.dataclass
class xLSTMState(MixerState):
    """c: (B, Hk, K, V + 1), C and n, and m: (B, Hk), all in float32 (float64 in a float64 model)."""

    c: Tensor
    m: Tensor


@register_mixer("xlstm")
class xLSTMMixer(Mixer):
    """The equations at the head of this file."""

    kernel = "gated_linear_attention"
    paper = "Beck et al. 2024, arXiv 2405.04517"
    decay_parameters = ("f_proj",)

    def __init__(self, config: xLSTMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj = AttentionProjections(config, key_width=config.xlstm_key_width)
        heads, width = self.proj.num_heads, self.proj.num_heads * self.proj.value_width
        self.i_proj = nn.Linear(config.hidden_size, self.proj.num_kv_heads)
        self.f_proj = nn.Linear(config.hidden_size, self.proj.num_kv_heads)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.norm = GroupedNorm(width, heads, config.rms_norm_eps, "layer")

    def init_weights(self) -> None:
        # Whatever `initializer_range`: "small init", Wang's for the way out, and gates that begin as constants.
        config = self.config
        for layer in (self.proj.q_proj, self.proj.k_proj, self.proj.v_proj):
            init.normal_(layer.weight, std=(2 / (5 * config.hidden_size)) ** 0.5)
        init.normal_(self.proj.o_proj.weight, std=2 / config.num_hidden_layers / config.hidden_size**0.5)
        for layer in (self.i_proj, self.f_proj, self.gate_proj):
            init.zeros_(layer.weight)
        init.constant_(self.i_proj.bias, -10.0)
        init.copy_(self.f_proj.bias, torch.linspace(3.0, 6.0, self.proj.num_kv_heads, device=self.f_proj.bias.device))

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """q, k, v and o take the teacher's places; gates and norm stay."""
        self.proj.load(weights)

    @torch.no_grad()
    def set_decay(self, log_decay: Tensor) -> None:
        """By the bias of the forget gate, within its cap."""
        log_f = shared_decay(log_decay, self.proj.num_kv_heads)
        bias = log_f - torch.log(-torch.expm1(log_f))  # the inverse of logsigmoid
        if (cap := self.config.xlstm_gate_cap) is not None:
            bias = cap * torch.atanh((bias / cap).clamp(-0.999, 0.999))
        self.f_proj.bias.copy_(bias)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> xLSTMState:
        heads, wide = self.proj.num_kv_heads, torch.promote_types(dtype, torch.float32)
        c = torch.zeros(batch, heads, self.proj.key_width, self.proj.value_width + 1, device=device, dtype=wide)
        return xLSTMState(c, torch.zeros(batch, heads, device=device, dtype=wide))

    def forward(self, hidden: Tensor, state: xLSTMState | None, ctx: Context):
        q, k, v = self.proj.split(hidden)
        write, log_decay, m = self._gates(hidden, None if state is None else state.m, ctx)
        k = (k * write[..., None]).to(v.dtype)
        v = F.pad(v, (0, 1), value=1.0)
        h, c = linear_attention(q, k, v, log_decay[..., None], None if state is None else state.c, ctx)
        h, qn = h.to(m.dtype).split([self.proj.value_width, 1], -1)
        m_of_heads = m.repeat_interleave(self.proj.num_heads // self.proj.num_kv_heads, -1)[..., None]
        fixed = m_of_heads.detach()
        # m scales h, qn and the floor alike, so there it is a constant to the gradient; against eps it is none.
        eps = self.config.xlstm_eps * (m_of_heads - fixed).exp()
        h = (h / (torch.maximum(qn.abs(), (-fixed).exp()) + eps)).to(v.dtype)
        h = self.norm(h.flatten(-2)) * torch.sigmoid(self.gate_proj(hidden))
        return self.proj.o_proj(h), None if state is None else xLSTMState(c, m[:, -1].clone())

    def _gates(self, hidden: Tensor, before: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """i', log f' and m, each (B, T, Hk), after the stabiliser `before` (B, Hk) of the calls before."""
        log_i, log_f = self.i_proj(hidden), self.f_proj(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if (cap := self.config.xlstm_gate_cap) is not None:
            log_i, log_f = cap * torch.tanh(log_i / cap), cap * torch.tanh(log_f / cap)
        log_i, log_f = log_i.to(wide), F.logsigmoid(log_f.to(wide))
        first = torch.zeros_like(log_i[:, 0]) if before is None else before
        starts = None if ctx.seq_ids is None else document_starts(ctx.seq_ids, ctx.mask)
        m = running_maximum(log_f, log_i, first, starts, ctx.mask)
        fixed = m.detach()
        previous = torch.cat([first[:, None].detach(), fixed[:, :-1]], 1)
        previous = previous if starts is None else previous.masked_fill(starts[..., None], 0.0)
        write = (log_i - fixed).clamp(max=0).exp()  # above 1 at padding alone
        log_decay = log_f + previous - fixed
        # 0 where m follows the forget gate, up to rounding; clamp() would take the gradient of half of these away.
        return write, log_decay - log_decay.detach().clamp(min=0), m


def running_maximum(log_f: Tensor, log_i: Tensor, first: Tensor, starts: Tensor | None, mask: Tensor | None) -> Tensor:
    """m_t = max(log_f_t + m_{t-1}, log_i_t), in log2(T) steps: an associative scan over (sum of log_f, maximum).

    Args:
        log_f, log_i: (B, T, H). first: (B, H), m before the first step.
        starts: (B, T) bool, steps before which m is 0. mask: (B, T) bool, False: m stays as it was.
    """
    peak, total = log_i, log_f
    if starts is not None:
        peak = torch.where(starts[..., None], torch.maximum(log_i, log_f), peak)
        total = total.masked_fill(starts[..., None], -torch.inf)
    if mask is not None:
        peak, total = peak.masked_fill(~mask[..., None], -torch.inf), total.masked_fill(~mask[..., None], 0.0)
    span = 1
    while span < log_f.shape[1]:
        peak_before = F.pad(peak[:, :-span], (0, 0, span, 0), value=-torch.inf)
        peak = torch.maximum(peak, total + peak_before)
        total = total + F.pad(total[:, :-span], (0, 0, span, 0))
        span *= 2
    return torch.maximum(peak, total + first[:, None])


xLSTMModel, xLSTMForCausalLM, xLSTMForSequenceClassification = model_classes(xLSTMConfig)
