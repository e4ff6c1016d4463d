"""Mixed precision, the same wherever a conversion runs a model: products in bfloat16, weights and sums in float32."""

from __future__ import annotations

import torch

__all__ = ["mixed_precision"]


def mixed_precision(device: torch.device | str, dtype: torch.dtype | bool | None) -> torch.autocast:
    """Within the block, products on `device` run in `dtype`; True stands for bfloat16, False and None for their own.

    Every call of a layer casts the weights that it has then. Autocast alone would keep the first cast of a weight until
    its block ends, and a layer whose weights are changed in place there would go on as it was.
    """
    kind = torch.device(device).type
    chosen = torch.bfloat16 if dtype is True else (dtype or None)
    return torch.autocast(kind, chosen, enabled=chosen is not None, cache_enabled=False)
