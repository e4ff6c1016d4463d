"""In which dtype states are kept."""

from __future__ import annotations

import torch

__all__ = ["state_dtype"]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the state, for inputs of this dtype: float32 or complex64, but float64 and complex128 stay as wide."""
    return torch.promote_types(dtype, torch.float32)
