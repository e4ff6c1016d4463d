"""Windows sized by measured error.

For each kv head and candidate length w: E ||W_o (o_w - o)||^2, the error that cutting its attention to w tokens and the
sinks leaves in the residual stream, times the mean squared gradient of the teacher's loss at that layer's output, so
that layers are comparable. Windows grow greedily by error removed per byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.errors import RnnzooError
from .observe import Observed, observe, sample_rows

if TYPE_CHECKING:
    from ...zoo.core.modeling import RecurrentForCausalLM
    from ..data import PackedTokens

__all__ = ["Measured", "allocate", "measure_windows"]

CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
Progress = Callable[[int, int], None]


@dataclass
class Measured:
    """errors: (layers, Hk, candidates), the weighted error that each candidate window leaves."""

    errors: Tensor
    candidates: tuple[int, ...]


def measure_windows(
    twin: RecurrentForCausalLM, data: PackedTokens, sinks: int, seed: int, progress: Progress | None = None
) -> Measured:
    """The error of every candidate window for every kv head, averaged over the sequences of `data`."""
    candidates = tuple(w for w in CANDIDATES if w < data.seq_len)
    total: Tensor | None = None
    for number in range(len(data)):
        layers = observe(twin, data[number]["input_ids"], True, seed + number)
        errors = torch.stack([_window_errors(layer, candidates, sinks, seed + number) for layer in layers])
        total = errors if total is None else total + errors
        if progress:
            progress((number + 1) * data.seq_len, data.num_tokens)
    assert total is not None
    return Measured(total / len(data), candidates)


@torch.no_grad()
def _window_errors(layer: Observed, candidates: tuple[int, ...], sinks: int, seed: int) -> Tensor:
    """(Hk, candidates) of one layer and sequence."""
    time, kv_heads, width = layer.k.shape
    groups = layer.q.shape[1] // kv_heads
    rows = sample_rows(time, seed)
    weight = float((layer.gradient**2).mean()) * layer.gradient.shape[-1]
    distance = rows[:, None] - torch.arange(time)[None]
    result = torch.zeros(kv_heads, len(candidates))
    for head in range(kv_heads):
        queries = slice(head * groups, (head + 1) * groups)
        scores = torch.einsum("nhd,td->hnt", layer.turned_q[rows, queries], layer.turned_k[:, head]) * width**-0.5
        scores = scores.masked_fill(distance < 0, -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        values = torch.cat([layer.v[:, head], torch.ones(time, 1)], -1)
        full = weights @ values
        full = full[..., :-1] / full[..., -1:]
        o_weight = layer.output_weight.unflatten(1, (-1, width))[:, queries]
        for i, window in enumerate(candidates):
            seen = (distance < window) | (torch.arange(time)[None] < sinks)
            cut = (weights * seen) @ values
            difference = cut[..., :-1] / cut[..., -1:] - full
            residual = torch.einsum("hnd,ohd->no", difference, o_weight)
            result[head, i] = (residual**2).sum(-1).mean() * weight
    return result


def allocate(measured: Measured, converted: list[int], slots: int) -> list[list[int]]:
    """Windows (layers, Hk) whose sum over the layers `converted` is at most `slots`; [] for the other layers.

    Greedy: the head and length with the most error removed per token of window, until the slots are spent.

    Raises:
        RnnzooError: the slots do not suffice for one token each.
    """
    kv_heads = measured.errors.shape[1]
    heads = [(layer, head) for layer in converted for head in range(kv_heads)]
    chosen = dict.fromkeys(heads, 0)
    spent = len(heads) * measured.candidates[0]
    if slots < spent:
        raise RnnzooError(
            f"The state budget leaves {slots} window tokens for {len(heads)} kv heads; give a larger one."
        )
    errors = measured.errors.tolist()
    while True:
        best = None
        for layer, head in heads:
            now = chosen[layer, head]
            for i in range(now + 1, len(measured.candidates)):
                cost = measured.candidates[i] - measured.candidates[now]
                if spent + cost > slots:
                    break
                gain = (errors[layer][head][now] - errors[layer][head][i]) / cost
                if gain > 0 and (best is None or gain > best[0]):
                    best = (gain, (layer, head), i, cost)
        if best is None:
            break
        _, where, i, cost = best
        chosen[where] = i
        spent += cost
    return [
        [measured.candidates[chosen[layer, head]] for head in range(kv_heads)] if layer in set(converted) else []
        for layer in range(measured.errors.shape[0])
    ]
