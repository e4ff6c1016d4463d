"""Which steps are there and where documents begin: what masks and packed sequences mean, once for all operations.

A masked step is as if it were not there, so documents are compared over valid steps only, and the first valid step of a
call continues the initial state whatever its id.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Documents", "document_starts", "one_step", "step_codes", "take", "valid_first"]


def document_starts(seq_ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T) True where the id differs from the valid step before; never at a masked step or the first valid one."""
    if mask is None:
        return F.pad(seq_ids[:, 1:] != seq_ids[:, :-1], (1, 0))
    steps = torch.arange(seq_ids.shape[1], device=seq_ids.device)
    last_valid = torch.where(mask, steps, -1).cummax(dim=1).values
    before = F.pad(last_valid[:, :-1], (1, 0), value=-1)
    return mask & (before >= 0) & (seq_ids.gather(1, before.clamp(min=0)) != seq_ids)


def step_codes(seq_ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(B, T) uint8 for fused code: 0 the step continues, 1 it begins a document, 2 it is masked; None: all continue."""
    if seq_ids is None and mask is None:
        return None
    codes = None if seq_ids is None else document_starts(seq_ids, mask).to(torch.uint8)
    if mask is None:
        return codes
    return torch.where(mask, 0 if codes is None else codes, 2).to(torch.uint8)


def valid_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) order that puts the valid steps first, each kind in its old order, and the order that undoes it."""
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return order, order.argsort(dim=1)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, n) of x (B, T, ...) along time."""
    return x.gather(1, rows.view(*rows.shape, *[1] * (x.ndim - 2)).expand(*rows.shape, *x.shape[2:]))


class Documents:
    """The same step by step, for the reference loops."""

    def __init__(self, batch: int, seq_ids: Tensor | None, mask: Tensor | None, device: torch.device):
        self.seq_ids, self.mask = seq_ids, mask
        self.everywhere = torch.ones(batch, dtype=torch.bool, device=device)
        self.seen = torch.zeros(batch, dtype=torch.bool, device=device)
        self.last = torch.zeros(batch, dtype=torch.int64, device=device)

    def step(self, t: int) -> tuple[Tensor, Tensor]:
        """(B,) which rows are valid at step t, (B,) which of them begin a document with it."""
        valid = self.everywhere if self.mask is None else self.mask[:, t]
        if self.seq_ids is None:
            return valid, torch.zeros_like(valid)
        ids = self.seq_ids[:, t].to(torch.int64)
        begins = valid & self.seen & (ids != self.last)
        self.last = torch.where(valid, ids, self.last)
        self.seen = self.seen | valid
        return valid, begins


def one_step(loop: Callable[..., tuple[Tensor, Any]], *inputs: str) -> Callable[..., Tensor]:
    """The step of decoding of which `loop` is the whole sequence: its output for one token, the state changed in place.

    Args:
        inputs: names of the arguments that have a row for each token (and one of them may be a constant, of one axis).
    """

    @torch.no_grad()
    def step(*, state: Any, **call: Any) -> Tensor:
        rows = {name: call[name][:, None] for name in inputs if call[name] is not None and call[name].ndim > 1}
        output, after = loop(**call | rows, initial_state=state, seq_ids=None, mask=None)
        single = isinstance(state, Tensor)
        for old, new in [(state, after)] if single else zip(state, after, strict=True):
            old.copy_(new)
        return output[:, 0]

    return step
