"""Mixed precision, the same wherever a conversion runs a model: products in bfloat16, weights and sums in float32."""

from __future__ import annotations

import functools
import logging
import time

import torch

__all__ = ["compute_dtype", "fast_bfloat16", "mixed_precision"]

log = logging.getLogger(__name__)


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether products in bfloat16 are about as fast on `device` as in float32, or faster.

    A CPU without the instructions has them from a loop that is dozens of times slower. torch says by which way it goes;
    where it was built without oneDNN, one small product is timed.
    """
    if torch.device(device).type != "cpu":
        return True
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return _slowdown() < 4


def compute_dtype(dtype: torch.dtype, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype to compute in where weights are saved in `dtype`: float32 for a bfloat16 that is slow on `device`.

    Args:
        device: None: CUDA where there is one, else the CPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype != torch.bfloat16 or fast_bfloat16(device):
        return dtype
    _say_float32()
    return torch.float32


@functools.cache
def _say_float32() -> None:
    """Once a process."""
    log.warning("This CPU has no bfloat16 products: computing in float32; what is saved stays bfloat16.")


@functools.cache
def _slowdown() -> float:
    """Time of a product in bfloat16 over that in float32, on the CPU."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(128, 256, dtype=dtype)
        taken = []
        for _ in range(4):
            started = time.perf_counter()
            torch.mm(a, a.T)
            taken.append(time.perf_counter() - started)
        seconds.append(min(taken))
    return seconds[1] / seconds[0]


def mixed_precision(device: torch.device | str, dtype: torch.dtype | bool | None) -> torch.autocast:
    """Within the block, products on `device` run in `dtype`; True stands for bfloat16, False and None for their own.

    Every call of a layer casts the weights that it has then. Autocast alone would keep the first cast of a weight until
    its block ends, and a layer whose weights are changed in place there would go on as it was.
    """
    kind = torch.device(device).type
    chosen = torch.bfloat16 if dtype is True else (dtype or None)
    return torch.autocast(kind, chosen, enabled=chosen is not None, cache_enabled=False)
