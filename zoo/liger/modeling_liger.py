"""Liger: a teacher's attention layer as gated linear attention, without a new parameter.

    g_t  = logsigmoid(k_t) / 16                                       the keys, not rotated, are the gates too
    S_t  = diag(e^{g_t}) S_{t-1} + softmax(k_t)^T v_t                 S in R^{d x d} per kv head
    l_t  = softmax(q_t) S_t                                           softmax over the channels of a head
    w_t  = softmax attention of the rotated q, k over the last 64 tokens
    out  = W_o (w_t + l_t) / 2                                        "Liger Attention"

All of it is the teacher's q, k, v and o. The paper pools the key projection to the width of the gates; as gates are per
key channel, the pool is of one. A group of query heads reads one state.

The authors' window loses its keys between calls; here they are kept, so decoding is the forward pass.

B batch, T time, H query heads, Hk kv heads, d head_dim, W the window.
Source: Lan et al. 2025, "Liger: Linearizing Large Language Models to Gated Recurrent Structures", sections 3.2 and 3.3,
and the authors' code.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.gated_linear_attention import WindowState
from ..core.attention import AttentionProjections
from ..core.heads import model_classes
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState
from ..core.recurrences import linear_attention, one_hot_values, window_attention
from ..core.registry import register_mixer
from .configuration_liger import LigerConfig


@dataclasses.dataclass
class LigerState(MixerState):
    """window: rings of the last W keys and values. s: (B, Hk, d, d), keys by values, float32 or float64."""

    window: WindowState
    s: Tensor


@register_mixer("liger")
class LigerMixer(Mixer):
    """The equations at the head of this file, between the teacher's projections."""

    kernel = "gated_linear_attention"
    rotates = True
    paper = "Lan et al. 2025, arXiv 2503.01496"
    branches = ("window", "linear")

    def __init__(self, config: LigerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj = AttentionProjections(config)
        self.lengths = (config.liger_window,) * config.num_key_value_heads
        self.shares = (0.5, 0.5)  # of window and state in the output

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """All of the teacher's attention; nothing is new."""
        self.proj.load(weights)

    @contextlib.contextmanager
    def only(self, branch: str) -> Iterator[None]:
        """ "window" or "linear", with the whole weight."""
        if branch not in self.branches:
            with super().only(branch):
                yield
        before, self.shares = self.shares, (float(branch == "window"), float(branch == "linear"))
        try:
            yield
        finally:
            self.shares = before

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LigerState:
        width = self.proj.head_dim
        window = WindowState.zeros(batch, self.lengths, 0, width, 0, width, dtype=dtype, device=device)
        shape = (batch, self.proj.num_kv_heads, width, width)
        return LigerState(window, torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def mixing_matrix(self, hidden: Tensor, ctx: Context) -> Tensor:
        q, k, v = self.proj.split(hidden)
        return self._mix(q, k, one_hot_values(v, v.shape[2]), None, ctx)[0].transpose(1, 2)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, state: LigerState | None, ctx: Context):
        """Outputs of the heads (B, T, H, d), and the state after them; q, k not rotated."""
        turned = ctx.rotary.rotate(q, ctx.positions), ctx.rotary.rotate(k, ctx.positions).to(v.dtype)
        near, window = window_attention(*turned, v, self.lengths, None if state is None else state.window, ctx)
        wide = torch.promote_types(v.dtype, torch.float32)
        gate = F.logsigmoid(k.to(wide)) / self.config.liger_gate_divisor
        q, k = (x.softmax(-1, dtype=wide).to(v.dtype) for x in (q, k))
        far, s = linear_attention(q, k, v, gate, None if state is None else state.s, ctx, scale=1.0)
        return self.shares[0] * near + self.shares[1] * far, LigerState(window, s)

    def forward(self, hidden: Tensor, state: LigerState | None, ctx: Context):
        o, after = self._mix(*self.proj.split(hidden), state, ctx)
        return self.proj.o_proj(o.flatten(-2)), None if state is None else after


LigerModel, LigerForCausalLM, LigerForSequenceClassification = model_classes(LigerConfig)
