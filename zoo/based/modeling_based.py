"""Based: linear attention whose weights are the second-order Taylor series of softmax attention's exponential.

    phi(x) phi(y) = 1 + s + s^2 / 2,  s = x y / sqrt(d')                              section 4.1
    [S_t, z_t] = [S_{t-1}, z_{t-1}] + phi(k_t)^T [v_t, 1]                             S in R^{F x d} per head
    o_t = phi(q_t) S_t / (phi(q_t) z_t)

phi(x) = [1, x / d'^(1/4), x_i^2 / sqrt(2 d'), x_i x_j / sqrt(d') for i < j], so F = 1 + d' + d' (d' + 1) / 2: 153 for
d' = 16. (The paper writes all d'^2 products; the two of a pair are equal, and one of them with twice the weight does.)
All weights are at least 1/2, so the denominator is never near 0. No decay and no rotation: large d' recalls more and
costs more memory, and what is near is left to neighbouring layers: windows of exact attention, and "based.convolution",

    y = (silu(causal convolution of x W_1 + b_1) * (x W_2 + b_2)) W_3 + b_3           BaseConv in the authors' code

B batch, T time, H query heads, Hk key/value heads (a group of query heads reads one state), d' feature_dim, d head_dim.
Source: Arora et al. 2024, "Simple linear attention language models balance the recall-throughput tradeoff".
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.linear import LinearMixer
from ..core.mixer import Context, Mixer, MixerState
from ..core.recurrences import convolve
from ..core.registry import register_mixer
from .configuration_based import BasedConfig


def taylor_width(width: int) -> int:
    """Features of a head of `width` channels."""
    return 1 + width + width * (width + 1) // 2


def taylor_features(x: Tensor) -> Tensor:
    """phi of x (..., d'): (..., F), the products diagonal by diagonal."""
    width = x.shape[-1]
    products = [x[..., : width - i] * x[..., i:] for i in range(1, width)]
    squares = x.square() * (2 * width) ** -0.5
    return torch.cat([torch.ones_like(x[..., :1]), x * width**-0.25, squares, *(p * width**-0.5 for p in products)], -1)


@register_mixer("based")
class BasedMixer(LinearMixer):
    """The equations at the head of this file."""

    paper = "Arora et al. 2024, arXiv 2402.18668"

    def __init__(self, config: BasedConfig, layer_idx: int):
        width = config.based_feature_dim
        super().__init__(config, layer_idx, key_width=width, feature_width=taylor_width(width), normalize=True)

    def features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return taylor_features(q), taylor_features(k)


@dataclasses.dataclass
class ConvolutionState(MixerState):
    """last: (B, inner width, taps - 1), the last inputs of the convolution."""

    last: Tensor


@register_mixer("based.convolution")
class GatedConvolution(Mixer):
    """Mixes a few neighbouring tokens: the last equation at the head of this file."""

    kernel = "short_conv"
    paper = BasedMixer.paper

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.inner, taps = config.based_conv_width, config.based_conv_kernel
        self.in_proj = nn.Linear(config.hidden_size, 2 * self.inner)
        # Only its weight is used: the kernel knows about states, documents and padding.
        self.conv1d = nn.Conv1d(self.inner, self.inner, taps, groups=self.inner, bias=False)
        self.out_proj = nn.Linear(self.inner, config.hidden_size)

    def init_weights(self) -> None:
        bound = self.config.based_conv_kernel**-0.5
        init.uniform_(self.conv1d.weight, -bound, bound)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> ConvolutionState:
        return ConvolutionState(
            torch.zeros(batch, self.inner, self.config.based_conv_kernel - 1, device=device, dtype=dtype)
        )

    def forward(self, hidden: Tensor, state: ConvolutionState | None, ctx: Context):
        x, gate = self.in_proj(hidden).chunk(2, -1)
        before = None if state is None else state.last
        x, last = convolve(x, self.conv1d.weight.squeeze(1), None, before, ctx, activation="silu")
        return self.out_proj(x * gate), None if state is None else ConvolutionState(last)


BasedModel, BasedForCausalLM, BasedForSequenceClassification = model_classes(BasedConfig)
