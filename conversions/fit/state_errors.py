"""What each choice of state costs in error: windows of many lengths, with linear states of several widths beside them.

For a kv head with a window of w tokens, the sinks and a linear state of F features (0: none), which the mixer fits in
closed form: E ||W_o (o_wF - o)||^2, the error left in the residual stream against full attention, times the mean
squared gradient of the teacher's loss at that layer's output, so that layers are comparable.

A pair (w, F > 0) is measured at the windows LINEAR_WINDOWS; between them, the factor by which the linear state changes
the error of the window alone is interpolated in log w. Prototypes are fitted on the first sequence and measured on the
others (on the first, where there is no other).

T tokens, H query heads, Hk kv heads, d head_dim, n rows (query positions sampled), F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...zoo.core.mixer import Mixer
from .observe import Observed, observe, sample_rows

if TYPE_CHECKING:
    from ...zoo.core.heads import RecurrentForCausalLM
    from ..data import PackedTokens

__all__ = [
    "WINDOWS",
    "Measured",
    "Progress",
    "attention_scores",
    "divided",
    "fewer_rows",
    "linear_sums",
    "mean_gradient",
    "measure_states",
    "residual",
    "residual_errors",
    "with_ones",
]

WINDOWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
LINEAR_WINDOWS = (4, 32, 128, 512)
LINEAR_ROWS = 128
GATHERED = 128  # tokens of a band that are faster gathered than masked
LARGEST = 60.0  # of a logit: exp of it stays far inside float32
Progress = Callable[[int, int], None]


@dataclass
class Measured:
    """errors: (layers, Hk, widths, windows), the weighted error that each pair leaves; widths[0] is always 0."""

    errors: Tensor
    windows: tuple[int, ...]
    widths: tuple[int, ...] = (0,)


def measure_states(
    teacher_model: RecurrentForCausalLM,
    data: PackedTokens,
    sinks: int,
    seed: int,
    widths: Sequence[int] = (),
    mixer: type[Mixer] = Mixer,
    progress: Progress | None = None,
) -> Measured:
    """The error of every window, and of every window beside a linear state of each of `widths` (zeros are ignored).

    Args:
        teacher_model: every layer attention. data: sequences of calibration text. sinks: first tokens kept exact.
        mixer: whose linear state it is.
    """
    windows = tuple(w for w in WINDOWS if w < data.seq_len)
    wide = tuple(sorted({width for width in widths if width > 0}))
    alone: list[Tensor] = []
    factors: list[Tensor] = []
    fitted: Any = None
    for number in range(len(data)):
        layers = observe(teacher_model, data[number]["input_ids"], True, seed + number)
        alone.append(torch.stack([_window_errors(layer, windows, sinks, seed + number) for layer in layers]))
        if wide and number == 0:
            fitted = _fit(mixer, teacher_model, layers, wide, windows, sinks, seed)
        if wide and (number or len(data) == 1):
            factors.append(
                torch.stack([_linear_errors(*both, sinks, seed + number) for both in zip(layers, fitted, strict=True)])
            )
        if progress:
            progress((number + 1) * data.seq_len, data.num_tokens)
    errors = torch.stack(alone).mean(0)[:, :, None]
    if not wide:
        return Measured(errors, windows)
    sums = torch.stack(factors).sum(0)  # (layers, Hk, widths, measured windows, 2): with the linear state, and without
    ratio = sums[..., 0] / sums[..., 1].clamp(min=1e-30)
    at = [w for w in LINEAR_WINDOWS if w < data.seq_len]
    ratio = _interpolated(ratio, at, windows)
    return Measured(torch.cat([errors, errors * ratio], 2), windows, (0, *wide))


def _interpolated(values: Tensor, at: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """values (..., len(at)) -> (..., len(wanted)), linear in the logarithm, constant beyond the ends."""
    shares = np.stack([np.interp(np.log(wanted), np.log(at), unit) for unit in np.eye(len(at))])
    return values @ torch.from_numpy(shares).to(values)


def attention_scores(layer: Observed, rows: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Scores (groups, n, T) of one kv head's queries, -inf for keys to come, and distances (n, T)."""
    time, kv_heads, width = layer.k.shape
    groups = layer.q.shape[1] // kv_heads
    queries = layer.turned_q[rows, head * groups : (head + 1) * groups]
    scores = torch.einsum("nhd,td->hnt", queries, layer.turned_k[:, head]) * width**-0.5
    distance = rows[:, None] - torch.arange(time)[None]
    return scores.masked_fill(distance < 0, -torch.inf), distance


def residual(layer: Observed, head: int, output: Tensor) -> Tensor:
    """(n, D): W_o times the outputs (groups, n, d) of one kv head's queries."""
    groups, _, width = output.shape
    o_weight = layer.output_weight.unflatten(1, (-1, width))[:, head * groups : (head + 1) * groups]
    return torch.einsum("hnd,ohd->no", output, o_weight)


def mean_gradient(layer: Observed) -> Tensor:
    """What an error at the layer's output weighs: the sum over channels of the mean squared gradient."""
    return (layer.gradient**2).mean() * layer.gradient.shape[-1]


def residual_errors(layer: Observed, head: int, differences: Tensor) -> Tensor:
    """(...,) mean squares of what differences (..., groups, n, d) of one kv head's outputs leave."""
    groups, rows, width = differences.shape[-3:]
    o_weight = layer.output_weight.unflatten(1, (-1, width))[:, head * groups : (head + 1) * groups].flatten(1)
    x = differences.transpose(-3, -2).flatten(-2)
    return ((x @ (o_weight.T @ o_weight)) * x).sum((-2, -1)) / rows


def with_ones(layer: Observed, head: int) -> Tensor:
    """(T, d + 1): values and a one, for the denominator."""
    return torch.cat([layer.v[:, head], torch.ones(len(layer.v), 1)], -1)


@torch.no_grad()
def _window_errors(layer: Observed, windows: Sequence[int], sinks: int, seed: int) -> Tensor:
    """(Hk, windows) of one layer and sequence."""
    time, kv_heads, _ = layer.k.shape
    rows = sample_rows(time, seed)
    result, gradient = torch.zeros(kv_heads, len(windows)), mean_gradient(layer)
    for head in range(kv_heads):
        scores, distance = attention_scores(layer, rows, head)
        weights, values = (scores - scores.amax(-1, keepdim=True)).exp(), with_ones(layer, head)
        full = divided(weights @ values)
        cut, outputs = weights[..., :sinks] @ values[:sinks], []
        weights[..., :sinks] = 0
        for near, far in zip((0, *windows), windows, strict=False):
            cut = cut + _band_sums(weights, values, rows, distance, near, far)
            outputs.append(divided(cut) - full)
        result[head] = residual_errors(layer, head, torch.stack(outputs)) * gradient
    return result


def _band_sums(weights: Tensor, values: Tensor, rows: Tensor, distance: Tensor, near: int, far: int) -> Tensor:
    """(groups, n, d + 1): what keys `near` to `far` - 1 tokens back add; weights (groups, n, T), values (T, d + 1)."""
    if far - near > GATHERED:
        return (weights * ((distance >= near) & (distance < far))) @ values
    keys = rows[:, None] - torch.arange(near, far)[None]
    picked = weights.gather(2, keys.clamp(min=0).expand(len(weights), -1, -1)) * (keys >= 0)
    return torch.einsum("hnb,nbd->hnd", picked, values[keys.clamp(min=0)])


def fewer_rows(time: int, seed: int) -> Tensor:
    """A third of the sampled rows, spread over them: each takes a pass over all keys for each choice."""
    rows = sample_rows(time, seed)
    return rows[torch.linspace(0, len(rows) - 1, min(LINEAR_ROWS, len(rows))).long()]


def divided(sums: Tensor) -> Tensor:
    """Numerators over denominators, the last column."""
    return sums[..., :-1] / sums[..., -1:]


def _fit(
    mixer: type[Mixer],
    teacher_model: RecurrentForCausalLM,
    layers: list[Observed],
    widths: Sequence[int],
    windows: Sequence[int],
    sinks: int,
    seed: int,
) -> list[list[Mixer]]:
    """Mixers [layer][width and window], their features fitted to one sequence."""
    time = len(layers[0].q)
    ctx, rows = teacher_model.model.make_context(1, time, layers[0].q.device), sample_rows(time, seed)
    sizes = [(window, sinks, width) for width in widths for window in LINEAR_WINDOWS if window <= windows[-1]]
    fitted = [[mixer.sized(teacher_model.config, *size) for size in sizes] for _ in layers]
    for layer, own in zip(layers, fitted, strict=True):
        for each in own:
            each.fit_features(layer.q, layer.k, ctx, rows, seed)
    return fitted


@torch.no_grad()
def _linear_errors(layer: Observed, mixers: list[Mixer], sinks: int, seed: int) -> Tensor:
    """(Hk, widths, windows, 2) of one layer and sequence: errors with the fitted linear state, and without it."""
    time, kv_heads, _ = layer.k.shape
    widths = list(dict.fromkeys(mixer.features for mixer in mixers))
    windows = list(dict.fromkeys(mixer.lengths[0] for mixer in mixers))
    rows = fewer_rows(time, seed)
    result = torch.zeros(kv_heads, len(widths), len(windows), 2)
    for head in range(kv_heads):
        scores, distance = attention_scores(layer, rows, head)
        largest = scores.amax(-1, keepdim=True)
        weights, values = (scores - largest).exp(), with_ones(layer, head)
        full = divided(weights @ values)
        for i, window in enumerate(windows):
            near = (distance < window) | (torch.arange(time)[None] < sinks)
            exact = (weights * near) @ values
            delay = torch.where(near, -torch.inf, (distance - window).float())
            outputs = [exact]
            for j in range(len(widths)):
                mixer = mixers[j * len(windows) + i]
                outputs.append(exact + linear_sums(mixer, layer, rows, head, delay, largest, values))
            errors = residual_errors(layer, head, divided(torch.stack(outputs)) - full) * mean_gradient(layer)
            result[head, :, i, 0], result[head, :, i, 1] = errors[1:], errors[0]
    return result


def linear_sums(
    mixer: Mixer, layer: Observed, rows: Tensor, head: int, delay: Tensor, largest: Tensor, values: Tensor
) -> Tensor:
    """(groups, n, d + 1): what the linear state adds to numerator and denominator, both times exp(-largest).

    Args:
        delay: (n, T) tokens since a key has left the window, -inf for keys that have not. largest: (groups, n, 1).
    """
    weights = mixer.linear_weights(head, layer.q[rows], layer.k[:, head], delay)
    return (weights @ values) * (-largest).clamp(max=LARGEST).exp()
