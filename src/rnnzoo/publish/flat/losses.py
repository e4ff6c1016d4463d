"""The loss of a linear head without all logits in memory. Stands for `kernels/losses`, which is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int = 256,
) -> Tensor:
    """Cross-entropy of hidden (N, D) with labels (N,), "mean" or "sum"; backward computes each chunk's logits again."""

    def loss(h: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h, weight.to(h.dtype), bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, y, ignore_index=ignore_index, reduction="sum")

    chunks = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    total = torch.stack([checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])
    return total.sum() / (labels != ignore_index).sum() if reduction == "mean" else total.sum()
