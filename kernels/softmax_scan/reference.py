"""The equations of `softmax_scan` as a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import state_dtype
from ..steps import Documents, one_step
from .state import SoftmaxState, exponent_of, initial


def softmax_scan(
    *,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    initial_state: SoftmaxState | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, SoftmaxState]:
    """See `kernels.softmax_scan`."""
    batch, time = k.shape[:2]
    dtype = state_dtype(v.dtype)
    state = initial(k, v, initial_state, dtype)
    empty = initial(k, v, None, dtype)
    decay = k.new_zeros(k.shape[2:], dtype=dtype) if decay is None else decay.to(dtype)
    documents = Documents(batch, seq_ids, mask, k.device)
    outputs = []
    for t in range(time):
        valid, begins = (flags[:, None, None] for flags in documents.step(t))
        k_t, v_t = (torch.where(valid, x[:, t].to(dtype), 0.0) for x in (k, v))  # whatever stood there
        before = SoftmaxState(*(torch.where(begins, blank, x) for blank, x in zip(empty, state, strict=True)))
        after = add(before, decay, k_t, v_t)
        read = after if bonus is None else add(before, torch.zeros_like(decay), k_t + bonus.to(dtype), v_t)
        weight = torch.where(read.denominator == 0, 1.0, read.denominator)
        outputs.append(torch.where(valid, read.numerator / weight, 0.0))
        state = SoftmaxState(*(torch.where(valid, new, old) for new, old in zip(after, state, strict=True)))
    return torch.stack(outputs, dim=1).to(v.dtype), state


def add(state: SoftmaxState, decay: Tensor, score: Tensor, value: Tensor) -> SoftmaxState:
    """The state, decayed by one step, with one more value."""
    decayed = state.maximum + decay
    maximum = torch.where(score > decayed, score, decayed)
    old, new = ((x - exponent_of(maximum)).exp() for x in (decayed, score))
    return SoftmaxState(maximum, old * state.numerator + new * value, old * state.denominator + new)


softmax_scan_step = one_step(softmax_scan, "k", "v")
