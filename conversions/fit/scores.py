"""How much a token will be looked at after it left the window, as a linear map of its hidden state, in closed form.

For every kv head of a layer, ridge regression of

    y_j = log( mean over later queries t >= j + NEAR and the head's query heads of the attention a_tj )

on the hidden state x_j of which the layer makes queries, keys and values. Which tokens matter shows only where a text
looks back, so half of the rows are texts that are followed by themselves (`PackedTokens.repeated`), as in KVzap
(2601.07891), which scores tokens by what they are worth while the model repeats its context. They need no words of any
task.

T tokens, H query heads, Hk kv heads, d head_dim, D hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NEAR", "ScoreFit", "attention_received"]

NEAR = 64  # tokens: attention that is closer does not count, since recent tokens are kept in any case
FEWEST = 128  # later queries that a token must have for its mean to count
RIDGE = 1e-3  # of the mean diagonal
LEAST = 1e-6  # attention below it is as good as none
ROWS = 512  # queries at a time


class ScoreFit:
    """Least squares of one layer, over any number of texts."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None

    @torch.no_grad()
    def add(self, hidden: Tensor, q: Tensor, k: Tensor) -> None:
        """Takes in one text: hidden (T, D), and q (T, H, d), k (T, Hk, d) with their rotation."""
        count = len(hidden) - NEAR - FEWEST
        if count < 1:
            return
        x = torch.cat([hidden[:count].double(), hidden.new_ones(count, 1, dtype=torch.float64)], 1)
        gram, cross = x.T @ x, x.T @ attention_received(q, k)[:count].double()
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross

    def solve(self) -> Tensor | None:
        """(Hk, D) float32; None where the texts were too short to say anything."""
        if self._gram is None or self._cross is None:
            return None
        ridge = RIDGE * self._gram.diagonal().mean() * torch.eye(len(self._gram), dtype=self._gram.dtype)
        return torch.linalg.solve(self._gram + ridge, self._cross)[:-1].T.float()


def attention_received(q: Tensor, k: Tensor) -> Tensor:
    """(T, Hk): logarithm of the mean attention that each token gets from queries NEAR tokens after it and more."""
    time, kv_heads, width = k.shape
    groups = q.shape[1] // kv_heads
    total = torch.zeros(time, kv_heads)
    step = torch.arange(time)
    for head in range(kv_heads):
        for rows in step.split(ROWS):
            queries = q[rows, head * groups : (head + 1) * groups].float()
            scores = torch.einsum("ngd,td->gnt", queries, k[:, head].float()) * width**-0.5
            distance = rows[:, None] - step
            weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
            total[:, head] += (weights * (distance >= NEAR)).sum((0, 1))
    later = (time - NEAR - step).clamp(min=1)[:, None]
    return (total / (later * groups) + LEAST).log()
