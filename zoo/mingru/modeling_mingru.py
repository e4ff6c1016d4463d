"""minGRU: one gate, both of whose sides sum to 1, and no state inside it.

    u   = causal depthwise convolution of the hidden states, 4 taps                (an option)
    z_t = sigmoid(W_z u_t)                                                         section 3.1
    c_t = g(W_h u_t),  g(x) = x + 1/2 for x >= 0, sigmoid(x) below                 appendix B.3
    h_t = (1 - z_t) * h_{t-1} + z_t * c_t                                          h_0 = 0
    out = W_o h_t

Neither gate nor candidate sees h_{t-1}, unlike a GRU's; so the recurrence is linear in h and a scan computes it.
g keeps the candidates positive, because the paper trains on logarithms. The numbers here are those of that form,
without the logarithms: our scan multiplies factors in [0, 1] and adds, which neither overflows nor cancels.

B batch, T time, D hidden_size, E = minrnn_expand * D channels of the state.
Source: Feng et al. 2024, "Were RNNs All We Needed?", sections 3.1 and 3.2, appendix B (forms in log space), appendix C
(blocks: convolution, recurrence, MLP).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.mixer import Context, Mixer, MixerState
from ..core.recurrences import convolve, scan
from ..core.registry import register_mixer
from .configuration_mingru import MinGRUConfig


@dataclasses.dataclass
class MinRNNState(MixerState):
    """conv: (B, D, taps - 1), the last inputs, None without a convolution. h: (B, E), float32 or float64."""

    conv: Tensor | None
    h: Tensor


class MinRNNMixer(Mixer):
    """What minGRU and minLSTM share: all but the gates.

    Attributes:
        gates: how many there are.
    """

    kernel = "linear_scan"
    paper = "Feng et al. 2024, arXiv 2410.01201"
    gates: int

    def __init__(self, config: MinGRUConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        width, taps = config.hidden_size, config.minrnn_conv_kernel
        self.inner = config.minrnn_expand * width
        # Only its parameters are used: the kernel knows about states, documents and padding.
        self.conv1d = nn.Conv1d(width, width, taps, groups=width) if taps else None
        self.in_proj = nn.Linear(width, (self.gates + 1) * self.inner, bias=config.minrnn_bias)
        self.out_proj = nn.Linear(self.inner, width, bias=config.minrnn_bias)

    def init_weights(self) -> None:
        if self.conv1d is not None:
            bound = self.config.minrnn_conv_kernel**-0.5
            init.uniform_(self.conv1d.weight, -bound, bound)
            init.uniform_(self.conv1d.bias, -bound, bound)

    def factors(self, *logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the gates, each (B, T, E) -> what is kept of the state and what is taken of the candidate."""
        raise NotImplementedError

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MinRNNState:
        conv = None
        if self.conv1d is not None:
            conv = torch.zeros(batch, *self.conv1d.weight.shape[::2], device=device, dtype=dtype)[..., 1:].contiguous()
        wide = torch.promote_types(dtype, torch.float32)
        return MinRNNState(conv, torch.zeros(batch, self.inner, device=device, dtype=wide))

    def forward(self, hidden: Tensor, state: MinRNNState | None, ctx: Context):
        u, conv = hidden, None
        if self.conv1d is not None:
            before = None if state is None else state.conv
            u, conv = convolve(u, self.conv1d.weight.squeeze(1), self.conv1d.bias, before, ctx, activation=None)
        mixed = self.in_proj(u)
        mixed = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
        *logits, candidate = mixed.chunk(self.gates + 1, -1)
        keep, take = self.factors(*logits)
        candidate = torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
        h, last = scan(keep, take * candidate, None if state is None else state.h, ctx)
        return self.out_proj(h.to(hidden.dtype)), None if state is None else MinRNNState(conv, last)


@register_mixer("mingru")
class MinGRUMixer(MinRNNMixer):
    """The equations at the head of this file. Rows of in_proj: W_z, then W_h."""

    gates = 1

    def factors(self, *logits: Tensor) -> tuple[Tensor, Tensor]:
        (update,) = logits
        return torch.sigmoid(-update), torch.sigmoid(update)


MinGRUModel, MinGRUForCausalLM, MinGRUForSequenceClassification = model_classes(MinGRUConfig)
