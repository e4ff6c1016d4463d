"""Softmax scan in plain torch with autograd, on any device: all chunks step by step at once, then chunk by chunk.

As in `linear_scan/chunked.py`, with L steps a chunk and C chunks there are L + C sequential operations, L close to C. A
chunk's sums start empty; the state before the chunk is added to each of them with the decay of the steps between. Every
sum is kept with the largest of its scores, and exponentials are taken of differences to it only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import state_dtype
from ..steps import document_starts
from .reference import add
from .state import SoftmaxState, exponent_of, initial

NEVER = float("-inf")  # the score of a step that is not there, the decay before a document's first step


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
    dtype, output_dtype = state_dtype(v.dtype), v.dtype
    state = initial(k, v, initial_state, dtype)
    k, v = k.to(dtype), v.to(dtype)
    decay = k.new_zeros(k.shape[2:]) if decay is None else decay.to(dtype)
    valid = torch.ones_like(k[:, :, :1, :1], dtype=torch.bool) if mask is None else mask[..., None, None]
    begins = torch.zeros_like(valid) if seq_ids is None else document_starts(seq_ids, mask)[..., None, None]
    scores = torch.where(valid, k, NEVER)
    values = v if mask is None else torch.where(valid, v, 0.0)
    states, final = _states(scores, values, decay, valid, begins, state)
    read = states
    if bonus is not None:
        before = _shifted(states, state, begins)
        read = add(before, torch.zeros_like(decay), scores + bonus.to(dtype), values)
    output = read.numerator / torch.where(read.denominator == 0, 1.0, read.denominator)
    return torch.where(valid, output, 0.0).to(output_dtype), final


def _states(
    scores: Tensor, values: Tensor, decay: Tensor, valid: Tensor, begins: Tensor, state: SoftmaxState
) -> tuple[SoftmaxState, SoftmaxState]:
    """The states after every step, (B, T, H, *), and the last one."""
    time = scores.shape[1]
    length = max(1, math.isqrt(time))
    chunks = -(-time // length)

    def chunked(x: Tensor, value: float) -> Tensor:
        """(B, T, ...) -> (B, C, L, ...); appended steps change nothing."""
        return F.pad(x, (0, 0, 0, 0, 0, chunks * length - time), value=value).unflatten(1, (chunks, length))

    scores, values = chunked(scores, NEVER), chunked(values, 0.0)
    valid, begins = chunked(valid, False), chunked(begins, False)
    # A product with the count, not a sum of decays: exact over any length.
    decays = torch.where(begins, NEVER, torch.where(valid, decay, 0.0))
    count = valid.cumsum(dim=2).to(decay.dtype)
    fade = torch.where(begins.cumsum(dim=2) > 0, NEVER, count * decay)

    own = SoftmaxState(
        scores[:, :, 0], values[:, :, 0] * (scores[:, :, 0] > NEVER), scores[:, :, 0].isfinite().to(decay.dtype)
    )
    steps = [own]
    for t in range(1, length):
        steps.append(add(steps[-1], decays[:, :, t], scores[:, :, t], values[:, :, t]))
    own = SoftmaxState(*(torch.stack(parts, dim=2) for parts in zip(*steps, strict=True)))

    before = []
    for chunk in range(chunks):
        before.append(state)
        state = _joined(state, fade[:, chunk, -1], SoftmaxState(*(x[:, chunk] for x in steps[-1])))
    earlier = SoftmaxState(*(torch.stack(parts, dim=1)[:, :, None] for parts in zip(*before, strict=True)))
    states = _joined(earlier, fade, own)
    return SoftmaxState(*(x.flatten(1, 2)[:, :time] for x in states)), state


def _joined(earlier: SoftmaxState, fade: Tensor, later: SoftmaxState) -> SoftmaxState:
    """The sums of two runs of steps; `fade` is the decay over the later one."""
    decayed = earlier.maximum + fade
    maximum = torch.where(later.maximum > decayed, later.maximum, decayed)
    left, right = ((x - exponent_of(maximum)).exp() for x in (decayed, later.maximum))
    numerator = left * earlier.numerator + right * later.numerator
    return SoftmaxState(maximum, numerator, left * earlier.denominator + right * later.denominator)


def _shifted(states: SoftmaxState, state: SoftmaxState, begins: Tensor) -> SoftmaxState:
    """The states before every step, empty where a document begins."""
    blanks = (NEVER, 0.0, 0.0)
    return SoftmaxState(
        *(
            torch.where(begins, blank, torch.cat([first[:, None], after[:, :-1]], dim=1))
            for blank, first, after in zip(blanks, state, states, strict=True)
        )
    )


def softmax_scan_step(
    *, k: Tensor, v: Tensor, state: SoftmaxState, decay: Tensor | None, bonus: Tensor | None
) -> Tensor:
    """See `kernels.softmax_scan_step`."""
    with torch.no_grad():
        dtype = state[1].dtype
        before, score, value = SoftmaxState(*state), k.to(dtype), v.to(dtype)
        none = torch.zeros((), dtype=dtype, device=k.device)
        after = add(before, none if decay is None else decay.to(dtype), score, value)
        read = after if bonus is None else add(before, none, score + bonus.to(dtype), value)
        output = read.numerator / torch.where(read.denominator == 0, 1.0, read.denominator)
        for old, new in zip(state, after, strict=True):
            old.copy_(new)
        return output.to(v.dtype)
