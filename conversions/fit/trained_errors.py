"""What windows of other lengths would leave in error beside the linear states of a trained student.

As in `state_errors.py`, but the student's own projections, features and decays are at work: for kv head h of a layer,
E ||W'_o o'_h(w) - W_o o_h||^2 with the teacher's hidden states as input, W'_o and o'_h(w) the student's, w the window.

T tokens, Hk kv heads, d head_dim, n rows (query positions sampled).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...zoo.core.mixer import Context, Mixer
from .observe import Observed, observe
from .state_errors import (
    WINDOWS,
    Measured,
    Progress,
    attention_scores,
    divided,
    fewer_rows,
    linear_sums,
    mean_gradient,
    residual,
    with_ones,
)

if TYPE_CHECKING:
    from ...zoo.core.heads import RecurrentForCausalLM
    from ..data import PackedTokens

__all__ = ["measure_trained"]


def measure_trained(
    teacher_model: RecurrentForCausalLM,
    student: RecurrentForCausalLM,
    data: PackedTokens,
    seed: int,
    progress: Progress | None = None,
) -> Measured:
    """The error of every window, those that the student has among them; 0 in layers that are attention.

    Args:
        student: of a mixer whose `linear_weights` are known.
    """
    blocks: Any = student.model.layers
    mixers = [block.mixer if block.mixer.divides_budget else None for block in blocks]
    own = {length for mixer in mixers if mixer is not None for length in mixer.lengths}
    windows = tuple(sorted({w for w in WINDOWS if w < data.seq_len} | own))
    total = torch.zeros(len(mixers), teacher_model.config.num_key_value_heads, 1, len(windows))
    for number in range(len(data)):
        ids = data[number]["input_ids"]
        ctx = student.model.make_context(1, len(ids), ids.device)
        for i, layer in enumerate(observe(teacher_model, ids, True, seed + number)):
            if (mixer := mixers[i]) is not None:
                total[i, :, 0] += _errors(layer, mixer, ctx, windows, seed + number) / len(data)
        if progress:
            progress((number + 1) * data.seq_len, data.num_tokens)
    return Measured(total, windows)


@torch.no_grad()
def _errors(layer: Observed, mixer: Mixer, ctx: Context, windows: Sequence[int], seed: int) -> Tensor:
    """(Hk, windows) of one layer and sequence."""
    student_heads = _as_seen(layer, mixer, ctx)
    time, kv_heads, _ = student_heads.k.shape
    rows = fewer_rows(time, seed)
    weight = mean_gradient(layer)
    result = torch.zeros(kv_heads, len(windows))
    for head in range(kv_heads):
        scores, distance = attention_scores(layer, rows, head)
        target = residual(layer, head, scores.softmax(-1) @ layer.v[:, head])
        scores, _ = attention_scores(student_heads, rows, head)
        largest, values = scores.amax(-1, keepdim=True), with_ones(student_heads, head)
        weights = (scores - largest).exp()
        for i, window in enumerate(windows):
            near = (distance < window) | (torch.arange(time)[None] < mixer.sinks)
            sums = (weights * near) @ values
            if mixer.features:
                delay = torch.where(near, -torch.inf, (distance - window).float())
                sums = sums + linear_sums(mixer, student_heads, rows, head, delay, largest, values)
            difference = residual(student_heads, head, divided(sums)) - target
            result[head, i] = (difference**2).sum(-1).mean() * weight
    return result


def _as_seen(layer: Observed, mixer: Mixer, ctx: Context) -> Observed:
    """What the student's projections make of the teacher's input."""
    output = mixer.output_projection()
    assert layer.hidden is not None and output is not None
    q, k, v = mixer.query_key_value(layer.hidden[None])
    turned = (ctx.rotary.rotate(x, ctx.positions) for x in (q, k))
    heads = [x[0].float() for x in (q, k, v, *turned)]
    return Observed(*heads, layer.gradient, output.weight.float(), layer.hidden)
