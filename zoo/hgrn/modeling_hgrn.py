"""HGRN: hierarchically gated recurrent network, real-valued.

    f_t = gamma_l + (1 - gamma_l) sigmoid(W_f x_t)                 at least gamma_l in layer l (section 3.2)
    h_t = f_t * h_{t-1} + (1 - f_t) * silu(W_i x_t)                input and forget gate are tied (section 3.3)
    o_t = W_o (RMSNorm(h_t) * silu(W_g x_t))

gamma is learned, 0 in the first layer and rising over the layers (`core.layers.LowerBounds`, a cumulative softmax), so
that lower layers see the near past and upper layers must remember long: that hierarchy distinguishes HGRN from minGRU
and other gated linear RNNs. The paper's h is complex, with a phase that the data do not control, and its output gate a
sigmoid; this is the real form in which flash-linear-attention trained and published models, and HGRN2 was built on.

B batch, T time, D hidden_size, E = hgrn_expand * D channels of the state.
Sources: Qin et al. 2023, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", section 3; real form:
flash-linear-attention, `HGRNAttention`.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.heads import model_classes
from ..core.layers import LowerBounds, RMSNorm
from ..core.mixer import Context, Mixer, MixerState
from ..core.recurrences import convolve, scan
from ..core.registry import register_mixer
from .configuration_hgrn import HGRNConfig


@dataclasses.dataclass
class HGRNState(MixerState):
    """h: (B, E), float32 or float64. conv: (B, 2 E, taps - 1), the last inputs; None without convolutions."""

    h: Tensor
    conv: Tensor | None


@register_mixer("hgrn")
class HGRNMixer(Mixer):
    """The equations at the head of this file."""

    kernel = "linear_scan"
    paper = "Qin et al. 2023, arXiv 2311.04823"

    def __init__(self, config: HGRNConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        width, self.inner, taps = config.hidden_size, config.hgrn_expand * config.hidden_size, config.hgrn_conv_kernel
        self.i_proj = nn.Linear(width, self.inner, bias=False)
        self.f_proj = nn.Linear(width, self.inner, bias=False)
        self.g_proj = nn.Linear(width, self.inner, bias=False)
        # One convolution for both, inputs before forget gates. Only its weight is used.
        self.conv1d = (
            nn.Conv1d(2 * self.inner, 2 * self.inner, taps, groups=2 * self.inner, bias=False) if taps else None
        )
        self.norm = RMSNorm(self.inner, config.rms_norm_eps)
        self.o_proj = nn.Linear(self.inner, width, bias=False)

    @staticmethod
    def shared(config: HGRNConfig) -> nn.Module | None:
        layers = [i for i, kind in enumerate(config.layer_types or ()) if kind == "hgrn"]
        if not config.hgrn_lower_bounds or len(layers) < 2:  # the first has none
            return None
        return LowerBounds(layers, config.hgrn_expand * config.hidden_size)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> HGRNState:
        taps, conv = self.config.hgrn_conv_kernel, None
        if taps:
            conv = torch.zeros(batch, 2 * self.inner, taps - 1, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return HGRNState(torch.zeros(batch, self.inner, device=device, dtype=wide), conv)

    def forward(self, hidden: Tensor, state: HGRNState | None, ctx: Context):
        i, f, conv = self.i_proj(hidden), self.f_proj(hidden), None
        if self.conv1d is not None:
            before = None if state is None else state.conv
            both, conv = convolve(
                torch.cat([i, f], -1), self.conv1d.weight.squeeze(1), None, before, ctx, activation=None
            )
            i, f = both.chunk(2, -1)
        wide = torch.promote_types(f.dtype, torch.float32)
        if "hgrn" in ctx.shared:
            log_forget, complement = ctx.shared["hgrn"](f, self.layer_idx, ctx)
            forget = log_forget.exp()
        else:
            forget, complement = torch.sigmoid(f.to(wide)), torch.sigmoid(-f.to(wide))
        h, last = scan(forget, complement * F.silu(i.to(wide)), None if state is None else state.h, ctx)
        o = self.norm(h) * F.silu(self.g_proj(hidden).to(wide))
        return self.o_proj(o.to(hidden.dtype)), None if state is None else HGRNState(last, conv)


HGRNModel, HGRNForCausalLM, HGRNForSequenceClassification = model_classes(HGRNConfig)
