"""What the custom operators of the C and the Triton backend share: both take and return the same tensors."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 16  # steps between kept states, as in cpu.c


def empty_outputs(
    k, v, decay, bonus, maximum, numerator, denominator, codes, keep
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, the last state's three tensors, and the states before each chunk (none unless `keep`)."""
    batch, time, heads, width = v.shape
    scores, single = k.shape[3], torch.float32
    chunks = -(-time // CHUNK) if keep else 0
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty(batch, heads, scores, dtype=single),
        v.new_empty(batch, heads, width, dtype=single),
        v.new_empty(batch, heads, scores, dtype=single),
        v.new_empty(batch, chunks, heads * (2 * scores + width), dtype=single),
    )


def empty_gradients(
    k, v, decay, bonus, codes, kept, dout, dmaximum, dnumerator, ddenominator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of k, v, decay, bonus and the initial state's three tensors."""
    dk, dv, *state = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v, dmaximum, dnumerator, ddenominator)
    )
    of_decay, of_bonus = (dmaximum.new_empty(k.shape[2:]) for _ in range(2))
    return dk, dv, of_decay, of_bonus, state[0], state[1], state[2]
