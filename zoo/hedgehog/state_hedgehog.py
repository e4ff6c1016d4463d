"""The memory of a Hedgehog layer: a linear state, and rings of the last keys and values, plain or in few bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.block_floating_point import Packed, pack
from ...kernels.dtypes import state_dtype
from ...kernels.gated_linear_attention import WindowState
from ..core.mixer import MixerState


@dataclasses.dataclass
class HedgehogState(MixerState):
    """The kernel's state: linear state, rings of the last tokens, sinks, and the count of tokens."""

    window: WindowState

    def unpack(self, dtype: torch.dtype) -> WindowState:
        """What the kernel takes."""
        return self.window


@dataclasses.dataclass
class PackedHedgehogState(MixerState):
    """The same with rings and sinks in few bits; fields and shapes as in `WindowState`. Gradients stop at it."""

    s: Tensor
    ring_k: Packed
    ring_v: Packed
    sink_k: Packed
    sink_v: Packed
    count: Tensor

    def unpack(self, dtype: torch.dtype) -> WindowState:
        """What the kernel takes."""
        rings = (x.unpack(dtype) for x in (self.ring_k, self.ring_v, self.sink_k, self.sink_v))
        return WindowState(self.s, *rings, self.count)

    @staticmethod
    def zeros(
        batch: int,
        heads: int,
        lengths: Sequence[int],
        sinks: int,
        features: int,
        width: int,
        bits: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> PackedHedgehogState:
        """Nothing seen yet."""
        rings = [
            Packed.zeros(batch, *shape, width, bits=number, device=device)
            for shape in ((sum(lengths),), (heads, sinks))
            for number in bits
        ]
        s = torch.zeros(batch, heads, features, width + 1, dtype=state_dtype(dtype), device=device)
        return PackedHedgehogState(s, *rings, torch.zeros(batch, dtype=torch.int64, device=device))

    @staticmethod
    def of(state: WindowState, k_bits: int, v_bits: int) -> PackedHedgehogState:
        """The kernel's state, packed."""
        return PackedHedgehogState(
            state.s,
            pack(state.ring_k, k_bits),
            pack(state.ring_v, v_bits),
            pack(state.sink_k, k_bits),
            pack(state.sink_v, v_bits),
            state.count,
        )
