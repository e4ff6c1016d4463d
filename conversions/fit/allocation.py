"""One budget of bytes, spent per layer and kv head among windows, linear states, both, and full attention.

Errors add up over heads, and so do bytes: to choose one pair (window, feature width) for each head, with one width for
all heads of a layer, or full attention for the layer, is a knapsack. It is solved by dynamic programming over the
budget, in units of the costs' common divisor, or in coarser ones (costs are rounded up) where that would be too many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...kernels.errors import RnnzooError
from .state_errors import Measured

__all__ = ["Allocation", "Costs", "allocate"]

UNITS, UNITS_PER_HEAD = 20_000, 64  # most cells of the budget: rounding up costs a head half of one, on average
KEPT = -1  # instead of a width: full attention


@dataclass(frozen=True)
class Costs:
    """Bytes of each thing.

    Attributes:
        layer: of a converted layer before any window: sinks, the count, and a linear state that is not to be chosen.
        token: of a window, per kv head. feature: of a linear state, per kv head and unit of width.
        attention: of a kept layer's keys and values at some context; None: not a candidate.
    """

    layer: int
    token: int
    feature: int
    attention: int | None = None


@dataclass
class Allocation:
    """What each layer gets; layers that are not converted have windows [] and width 0.

    Attributes:
        attention: layers that the budget keeps as attention, which takes `attention_bytes` of it.
        state_bytes: of all windows and linear states, as the cache will have them.
        error: weighted error that is left.
    """

    window_sizes: list[list[int]]
    feature_widths: list[int]
    attention: list[int] = field(default_factory=list)
    state_bytes: int = 0
    attention_bytes: int = 0
    error: float = 0.0


def allocate(
    measured: Measured,
    converted: Iterable[int],
    budget: int,
    costs: Costs,
    fixed_widths: Mapping[int, int] | None = None,
    may_keep: Iterable[int] = (),
) -> Allocation:
    """The choice with the least error whose bytes are at most `budget`.

    Args:
        converted: layers that have windows. fixed_widths: of layers whose linear state must stay as it is.
        may_keep: layers among `converted` that may be full attention instead, at `costs.attention`.

    Raises:
        RnnzooError: the budget does not suffice for windows of one token.
    """
    layers, fixed, may_keep = sorted(converted), dict(fixed_widths or {}), set(may_keep)
    kv_heads = measured.errors.shape[1]
    least = {i: costs.layer + kv_heads * (costs.token + costs.feature * fixed.get(i, 0)) for i in layers}
    spare = budget - sum(least.values())
    if spare < 0:
        raise RnnzooError(
            f"A state budget of {budget:,} bytes is too small: windows of one token in {len(layers)} layers take "
            f"{budget - spare:,}; give a larger one."
        )
    choices = {i: _layer_choices(measured, i, costs, fixed.get(i), i in may_keep, least[i]) for i in layers}
    unit = _unit(choices.values(), spare, UNITS + UNITS_PER_HEAD * kv_heads * len(layers))
    best, tables = np.zeros(spare // unit + 1), {}
    for i in layers:
        best, tables[i] = _with_layer(best, choices[i], unit)
    result = Allocation([[] for _ in measured.errors], [0] * len(measured.errors), error=float(best[-1]))
    left = len(best) - 1
    for i in reversed(layers):
        choice, picked, left = _walk_back(choices[i], tables[i], left, unit)
        if choice.width == KEPT:
            result.attention.insert(0, i)
            result.attention_bytes += costs.attention or 0
        else:
            result.window_sizes[i] = [measured.windows[p] for p in picked]
            result.feature_widths[i] = choice.width
            tokens = sum(result.window_sizes[i])
            result.state_bytes += costs.layer + tokens * costs.token + kv_heads * choice.width * costs.feature
    return result


@dataclass(frozen=True)
class _Choice:
    """A layer with one width: its bytes beyond the least, and (bytes, error) of every window for each head."""

    width: int
    cost: int
    heads: list[list[tuple[int, float]]]


def _layer_choices(
    measured: Measured, layer: int, costs: Costs, fixed: int | None, may_keep: bool, least: int
) -> list[_Choice]:
    errors = measured.errors[layer].tolist()
    windows = [(w - measured.windows[0]) * costs.token for w in measured.windows]
    choices = []
    for j, width in enumerate(measured.widths):
        if fixed is None or width == fixed:
            cost = 0 if fixed is not None else len(errors) * width * costs.feature
            heads = [list(zip(windows, head[j], strict=True)) for head in errors]
            choices.append(_Choice(width, cost, heads))
    if may_keep and costs.attention is not None:
        choices.append(_Choice(KEPT, max(0, costs.attention - least), []))
    if not choices:
        raise RnnzooError(f"Layer {layer} has {fixed} features, but only {measured.widths} were measured.")
    return choices


def _unit(choices: Iterable[list[_Choice]], spare: int, most: int) -> int:
    """Bytes of a cell."""
    amounts = {cost for layer in choices for choice in layer for head in choice.heads for cost, _ in head}
    amounts |= {choice.cost for layer in choices for choice in layer}
    return max(math.gcd(*amounts) or 1, -(-spare // most), 1)


def _with_layer(best: np.ndarray, choices: Sequence[_Choice], unit: int) -> tuple[np.ndarray, tuple]:
    """The least error for each cell after one more layer, and how it came about."""
    results, picks = [], []
    for choice in choices:
        now, own = _with_options(best, [(choice.cost, 0.0)], unit)[0], []
        for head in choice.heads:
            now, picked = _with_options(now, head, unit)
            own.append(picked)
        results.append(now)
        picks.append(own)
    which = np.argmin(results, 0)
    return np.take_along_axis(np.stack(results), which[None], 0)[0], (which, picks)


def _with_options(best: np.ndarray, options: list[tuple[int, float]], unit: int) -> tuple[np.ndarray, np.ndarray]:
    """min over options of best[cell - cost] + error, and which it is: the cheapest among equals."""
    result, picked = np.full_like(best, np.inf), np.zeros(len(best), dtype=np.int16)
    for number, (cost, error) in enumerate(options):
        cells = -(-cost // unit)
        if cells >= len(best):
            continue
        sums = best[: len(best) - cells] + error
        better = sums < result[cells:]
        result[cells:][better] = sums[better]
        picked[cells:][better] = number
    return result, picked


def _walk_back(choices: Sequence[_Choice], table: tuple, left: int, unit: int) -> tuple[_Choice, list[int], int]:
    """A layer's choice, the windows of its heads, and the cells that are left for the layers before."""
    which, picks = table
    number = int(which[left])
    choice, picked = choices[number], []
    for head, table_ in zip(reversed(choice.heads), reversed(picks[number]), strict=True):
        picked.insert(0, int(table_[left]))
        left -= -(-head[picked[0]][0] // unit)
    return choice, picked, left - -(-choice.cost // unit)
