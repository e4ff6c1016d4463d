"""How far back the heads of an attention layer look."""

from __future__ import annotations

import torch
from torch import Tensor

from ...zoo.core.attention import FullAttention
from ...zoo.core.mixer import Context
from .observe import sample_rows

__all__ = ["Distances"]

SINKS = 4  # the first tokens of a document take what a head has no use for, from any distance
LEAST = 1.0


class Distances:
    """The mean distance, in tokens, of the attention of every query head, the first tokens of a document apart.

    Args:
        mixer: a teacher's layer, with H query heads.
    """

    def __init__(self, mixer: FullAttention):
        self.mixer = mixer
        self.mass = torch.zeros(mixer.proj.num_heads, dtype=torch.float64)
        self.total = torch.zeros_like(self.mass)

    def add(self, given: Tensor, ctx: Context) -> None:
        """Takes in a sample of the query positions of given (1, T, D), what the layer sees."""
        q, k, _ = (x[0].float() for x in self.mixer.project(given, ctx))
        time, groups = len(q), q.shape[1] // k.shape[1]
        rows = sample_rows(time, 0).to(q.device)
        steps = torch.arange(time, device=q.device)
        distance = rows[:, None] - steps[None]
        seen = distance >= 0
        if self.mixer.window is not None:
            seen &= distance < self.mixer.window
        if ctx.seq_ids is not None:
            seen &= ctx.seq_ids[0][rows, None] == ctx.seq_ids[0][None]
        counted = ctx.positions[0].expand(time) >= SINKS
        for head in range(q.shape[1]):
            scores = (q[rows, head] @ k[:, head // groups].T) * q.shape[-1] ** -0.5
            share = scores.masked_fill(~seen, -torch.inf).softmax(-1) * counted
            self.mass[head] += float(share.sum())
            self.total[head] += float((share * distance).sum())

    def mean(self) -> Tensor:
        """(H,), float32, at least one token."""
        return (self.total / self.mass.clamp(min=1e-9)).clamp(min=LEAST).float()
