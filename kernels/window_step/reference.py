"""`window_step` by the loop of `gated_linear_attention`."""

from __future__ import annotations

from functools import partial

from . import chunked
from .chunked import leaving_keys

__all__ = ["leaving_keys", "window_step"]

window_step = partial(chunked.window_step, backend="reference")
