"""What each number of tokens costs in error, where a score decides which of them a kv head keeps.

As `state_errors.py` has it for windows: E ||W_o (o_n - o)||^2 for n tokens kept, times the mean squared gradient of the
teacher's loss at the layer's output. The scores are those of `scores.py`, fitted to the same text. Half of the rows are
texts that are followed by themselves, read by the queries of the second half: error on ordinary text does not see the
few heads that look far back, which a model cannot do without where it has to look something up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.bounded_attention import Bounds, kept_until
from ...zoo.core.configuration import RecurrentConfig
from ...zoo.core.mixer import Mixer
from .observe import Observed, observe, sample_rows
from .scores import ScoreFit
from .state_errors import (
    WINDOWS,
    Measured,
    Progress,
    attention_scores,
    divided,
    mean_gradient,
    residual_errors,
    with_ones,
)

if TYPE_CHECKING:
    from ...zoo.core.heads import RecurrentForCausalLM
    from ..data import PackedTokens

__all__ = ["measure_scored"]


def measure_scored(
    teacher_model: RecurrentForCausalLM,
    data: PackedTokens,
    config: RecurrentConfig,
    mixer: type[Mixer],
    seed: int,
    progress: Progress | None = None,
) -> Measured:
    """The error of every number of tokens in WINDOWS that a row of `data` is longer than, beside the sinks.

    Args:
        teacher_model: every layer attention. config: of the student. mixer: of it, one that `keeps_by_score`.
    """
    numbers = tuple(w for w in WINDOWS if w < data.seq_len)
    rows = [*_rows(data), *_rows(data.repeated())]
    done, total = 0, 2 * len(rows) * data.seq_len
    fits = [ScoreFit() for _ in teacher_model.model.layers]
    for ids in rows:
        for fit, layer in zip(fits, observe(teacher_model, ids, False, seed), strict=True):
            assert layer.hidden is not None
            fit.add(layer.hidden, layer.turned_q, layer.turned_k)
        done += len(ids)
        if progress:
            progress(done, total)
    found = [fit.solve() for fit in fits]
    errors, gradients = [], []
    for number, ids in enumerate(rows):
        text = number < len(data)
        layers = observe(teacher_model, ids, text, seed + number)
        if text:
            gradients.append(torch.stack([mean_gradient(layer) for layer in layers]))
        queries = sample_rows(len(ids), seed + number)
        if not text:  # where the second half looks back
            queries = len(ids) // 2 + sample_rows(len(ids) - len(ids) // 2, seed + number)
        errors.append(
            torch.stack([_errors(*each, queries, numbers, config, mixer) for each in zip(layers, found, strict=True)])
        )
        done += len(ids)
        if progress:
            progress(done, total)
    # A repetition is foretold so well that its own gradients are next to nothing.
    weights = torch.stack(gradients).mean(0)[:, None, None]
    return Measured((torch.stack(errors).mean(0) * weights)[:, :, None], numbers)


def _rows(data: PackedTokens) -> Iterator[Tensor]:
    for number in range(len(data)):
        yield data[number]["input_ids"]


@torch.no_grad()
def _errors(
    layer: Observed,
    scores: Tensor | None,
    queries: Tensor,
    numbers: tuple[int, ...],
    config: RecurrentConfig,
    mixer: type[Mixer],
) -> Tensor:
    """(Hk, numbers) of one layer and text, for queries at these positions; not yet times the gradient."""
    time, kv_heads, _ = layer.k.shape
    assert layer.hidden is not None
    value = layer.hidden.new_zeros(time, kv_heads) if scores is None else layer.hidden @ scores.T
    step, result = torch.arange(time), torch.zeros(kv_heads, len(numbers))
    seen = []
    for number in numbers:
        sizes = (number,) * kv_heads
        until = kept_until(value[None], Bounds(sizes, mixer.recent_tokens(config, sizes), config.num_sinks))[0]
        seen.append((step <= queries[:, None]) & (until.T[:, None] > queries[:, None]))
    for head in range(kv_heads):
        logits, _ = attention_scores(layer, queries, head)
        weights, values = (logits - logits.amax(-1, keepdim=True)).exp(), with_ones(layer, head)
        full = divided(weights @ values)
        cut = torch.stack([divided((weights * which[head]) @ values) for which in seen])
        result[head] = residual_errors(layer, head, cut - full)
    return result
