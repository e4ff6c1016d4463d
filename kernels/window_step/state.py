"""What `window_step` is given of a layer's memory."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..block_floating_point import Packed

__all__ = ["State"]


class State(Protocol):
    """What a layer with a window remembers: the fields of `gated_linear_attention.WindowState`, rings packed or not."""

    s: Tensor
    ring_k: Tensor | Packed
    ring_v: Tensor | Packed
    sink_k: Tensor | Packed
    sink_v: Tensor | Packed
    count: Tensor
