"""What the generations of RWKV share: token shift, the ramps of its factors, channel mixing.

    shift(x)_t = x_{t-1} + m (x_t - x_{t-1})      RWKV-4, 5: m is the share of the new token
    shift(x)_t = x_t + m (x_{t-1} - x_t)          RWKV-6, 7: m is the share of the token before

B batch, T time, D hidden_size. With multiple temporal perspectives (RWKV-4) the hidden
states are (B, T, P, D), and factors (P, D).
Sources: Peng et al. 2023 (RWKV-4), 2024 (Eagle and Finch), 2025 (RWKV-7); initialisation: the authors' training code
(BlinkDL/RWKV-LM, `src/model.py` of each generation).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from .configuration import RecurrentConfig
from .mixer import Context, Mixer, MixerState
from .recurrences import token_shift

__all__ = [
    "ChannelMix",
    "LastToken",
    "RWKVConfig",
    "curve",
    "depth",
    "factor_shape",
    "mix",
    "orthogonal_",
    "ramp",
    "shift",
]


@strict
class RWKVConfig(RecurrentConfig):
    """Norms with bias, normed embeddings, and the channel mixer of its own generation, by default.

    Args:
        rwkv_zero_init: start the matrices that write into the residual stream, and the first of every low-rank pair, at
            zero, as the authors do. Every block is the identity at first, and what comes before such a matrix gets its
            first gradient in the second step.
    """

    norm_type: str = "layer"
    embedding_norm: bool = True
    rwkv_zero_init: bool = True
    channel_ratio: ClassVar[float] = 4  # width of the channel mixer over hidden_size

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None and self.channel_mixer == self.mixer:
            self.intermediate_size = max(32, int(self.channel_ratio * self.hidden_size) // 32 * 32)
        super().__post_init__(**kwargs)


def depth(config: RecurrentConfig, layer_idx: int) -> tuple[float, float]:
    """How deep a layer is: from 0 in the first to 1 in the last, and from 1 in the first to almost 0 in the last."""
    layers = config.num_hidden_layers
    return layer_idx / max(1, layers - 1), 1 - layer_idx / layers


def ramp(width: int, power: float, device: torch.device) -> Tensor:
    """(channel / width)^power: (width,)."""
    return (torch.arange(width, device=device) / width) ** power


def curve(width: int, low: float, span: float, power: float, device: torch.device) -> Tensor:
    """From low to low + span over the channels, as a power: (width,)."""
    return low + span * (torch.arange(width, device=device) / max(1, width - 1)) ** power


def orthogonal_(weight: Tensor, gain: float = 1.0) -> None:
    """Orthogonal rows or columns; made in float32, for bfloat16 has no such decomposition."""
    if weight.is_meta or getattr(weight, "_is_hf_initialized", False):
        return
    init.copy_(weight, nn.init.orthogonal_(torch.empty(weight.shape, device=weight.device), gain))


def shift(x: Tensor, last: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor]:
    """x (B, T, ..., D) of the token before, and that of the last token, (B, ... * D)."""
    before, last = token_shift(x.flatten(2), last, ctx)
    return before.view_as(x), last


def mix(x: Tensor, before: Tensor, factor: Tensor, of_new: bool) -> Tensor:
    """The two equations at the head of this file: `factor` is the share of x if `of_new`, else of the token before."""
    old, new = (before, x) if of_new else (x, before)
    return old + factor * (new - old)


@dataclasses.dataclass
class LastToken(MixerState):
    """x: (B, D), the last token's normed hidden state."""

    x: Tensor


class ChannelMix(Mixer):
    """sigmoid(R shift(x, m_r)) * V relu(K shift(x, m_k))^2, the first factor only where `gated`.

    Attributes:
        of_new: the factors m are shares of the new token. power: of the ramp of m at the start, in terms of the depth.
    """

    gated: ClassVar[bool] = True
    of_new: ClassVar[bool] = False
    power: ClassVar[int] = 1

    def __init__(self, config: RecurrentConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        width, inner = config.hidden_size, config.intermediate_size
        shape = factor_shape(config)
        self.mix_k = nn.Parameter(torch.zeros(shape))
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(inner, width, bias=False)
        if self.gated:
            self.mix_r = nn.Parameter(torch.zeros(shape))
            self.receptance = nn.Linear(width, width, bias=False)

    def init_weights(self) -> None:
        share = ramp(self.mix_k.shape[-1], depth(self.config, self.layer_idx)[1] ** self.power, self.mix_k.device)
        share = share if self.of_new else 1 - share
        init.copy_(self.mix_k, share.expand_as(self.mix_k))
        orthogonal_(self.key.weight)
        into_zero = [self.value]
        if self.gated:
            init.copy_(self.mix_r, share.expand_as(self.mix_r))
            into_zero.append(self.receptance)
        for linear in into_zero if getattr(self.config, "rwkv_zero_init", True) else []:
            init.zeros_(linear.weight)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LastToken:
        return LastToken(torch.zeros(batch, self.mix_k.numel(), device=device, dtype=dtype))

    def forward(self, hidden: Tensor, state: LastToken | None, ctx: Context):
        before, last = shift(hidden, None if state is None else state.x, ctx)
        y = self.value(F.relu(self.key(mix(hidden, before, self.mix_k, self.of_new))).square())
        if self.gated:
            y = torch.sigmoid(self.receptance(mix(hidden, before, self.mix_r, self.of_new))) * y
        return y, None if state is None else LastToken(last)


def factor_shape(config: RecurrentConfig) -> tuple[int, ...]:
    """Of the factors of a token shift: (D,), or (P, D) with several temporal perspectives."""
    perspectives = getattr(config, "temporal_perspectives", 1)
    return (config.hidden_size,) if perspectives == 1 else (perspectives, config.hidden_size)
