"""The budget is spent as an exhaustive search would spend it, and its bytes are those of the cache."""

from __future__ import annotations

import itertools

import pytest
import torch

from rnnzoo.conversions.fit.allocation import Costs, allocate
from rnnzoo.conversions.fit.state_errors import Measured
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.student import budget_of, layer_types, student_config
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.cache import RecurrentCache
from rnnzoo.zoo.core.sizes import causal_lm_class, state_bytes

from ..tiny import tiny_teacher

WINDOWS, WIDTHS = (1, 2, 4, 8), (0, 2, 4)
COSTS = Costs(layer=7, token=6, feature=5)


def random_errors(seed: int, layers: int = 2, heads: int = 2, widths=WIDTHS) -> Measured:
    """Errors that mostly fall with the window and with the width, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(layers, heads, len(widths), len(WINDOWS), generator=generator) ** 3
    noise = 0.05 * torch.rand(steps.shape, generator=generator)
    return Measured(steps.flip(-1).cumsum(-1).flip(-1).flip(2).cumsum(2).flip(2) + noise, WINDOWS, tuple(widths))


def searched(measured: Measured, budget: int, costs: Costs, may_keep=()) -> float:
    """The least error of all choices within the budget."""
    layers, heads = measured.errors.shape[:2]
    per_layer = []
    for layer in range(layers):
        options = [(costs.attention, 0.0)] if layer in may_keep else []
        for j, width in enumerate(measured.widths):
            for picked in itertools.product(range(len(WINDOWS)), repeat=heads):
                tokens = sum(WINDOWS[i] for i in picked)
                error = sum(float(measured.errors[layer, h, j, i]) for h, i in enumerate(picked))
                options.append((costs.layer + tokens * costs.token + heads * width * costs.feature, error))
        per_layer.append(options)
    return min(
        sum(error for _, error in choice)
        for choice in itertools.product(*per_layer)
        if sum(cost for cost, _ in choice) <= budget
    )


def bytes_of(measured: Measured, found, costs: Costs) -> int:
    total = 0
    for i, sizes in enumerate(found.window_sizes):
        if i in found.attention:
            total += costs.attention
        elif sizes:
            total += costs.layer + sum(sizes) * costs.token + len(sizes) * found.feature_widths[i] * costs.feature
    return total


def left(measured: Measured, found) -> float:
    """The error that these windows and widths leave."""
    total = 0.0
    for i, sizes in enumerate(found.window_sizes):
        j = measured.widths.index(found.feature_widths[i])
        total += sum(float(measured.errors[i, h, j, WINDOWS.index(w)]) for h, w in enumerate(sizes))
    return total


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_within_the_budget_leaves_less_error(seed):
    measured = random_errors(seed)
    for budget in range(38, 290, 36):
        found = allocate(measured, [0, 1], budget, COSTS)
        assert found.state_bytes == bytes_of(measured, found, COSTS) <= budget
        assert found.error == pytest.approx(left(measured, found))
        assert found.error == pytest.approx(searched(measured, budget, COSTS))


@pytest.mark.parametrize("seed", range(4))
def test_attention_is_kept_where_that_leaves_the_least_error(seed):
    measured, costs = random_errors(seed), Costs(7, 6, 5, attention=90)
    kept = set()
    for budget in range(38, 290, 36):
        found = allocate(measured, [0, 1], budget, costs, may_keep=[1])
        assert found.state_bytes + found.attention_bytes == bytes_of(measured, found, costs) <= budget
        assert found.error == pytest.approx(searched(measured, budget, costs, may_keep=[1]))
        kept |= set(found.attention)
    assert kept == {1}


def test_a_budget_in_coarse_cells_is_kept_and_spent_nearly_as_well(monkeypatch):
    measured = random_errors(0, layers=6, heads=3)
    exact = allocate(measured, range(6), 700, COSTS)
    monkeypatch.setattr("rnnzoo.conversions.fit.allocation.UNITS", 100)
    monkeypatch.setattr("rnnzoo.conversions.fit.allocation.UNITS_PER_HEAD", 0)
    coarse = allocate(measured, range(6), 700, COSTS)
    assert coarse.state_bytes == bytes_of(measured, coarse, COSTS) <= 700
    assert exact.error <= coarse.error < 1.1 * exact.error


def test_state_goes_where_the_error_is():
    errors = torch.ones(2, 2, 1, 4) * torch.tensor([1.0, 0.8, 0.5, 0.1])
    errors[1, 0] *= 100
    found = allocate(Measured(errors, WINDOWS), [0, 1], 14 + 6 * 11, COSTS)
    assert found.window_sizes == [[1, 1], [8, 1]]


def test_what_removes_nothing_is_not_bought():
    found = allocate(Measured(torch.ones(2, 1, 3, 4), WINDOWS, WIDTHS), [0, 1], 1000, COSTS)
    assert found.window_sizes == [[1], [1]] and found.feature_widths == [0, 0] and found.state_bytes == 26


def test_a_linear_state_is_bought_where_it_removes_more_per_byte():
    errors = torch.ones(2, 1, 2, 4)
    errors[0, 0, 1] = 0.1
    found = allocate(Measured(errors, WINDOWS, (0, 4)), [0, 1], 1000, COSTS)
    assert found.feature_widths == [4, 0]


def test_fixed_widths_stay_and_kept_layers_take_nothing():
    measured = random_errors(1, layers=3)
    found = allocate(measured, [0, 2], 150, COSTS, fixed_widths={0: 4})
    assert found.feature_widths[0] == 4 and found.window_sizes[1] == [] and found.feature_widths[1] == 0
    assert found.state_bytes == bytes_of(measured, found, COSTS) <= 150


def test_too_small_a_budget_is_refused_with_the_least_one():
    with pytest.raises(RnnzooError, match="take 38; give a larger one"):
        allocate(random_errors(0), [0, 1], 37, COSTS)
    assert allocate(random_errors(0), [0, 1], 38, COSTS).state_bytes == 38
    with pytest.raises(RnnzooError, match="3 features, but only"):
        allocate(random_errors(0), [0, 1], 200, COSTS, fixed_widths={0: 3})


@pytest.mark.parametrize("bits", [None, [8, 4]])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_bytes_of_a_plan_are_those_of_the_cache(family, bits, tmp_path):
    """Of a model that has read some text."""
    teacher = resolve_teacher(str(tiny_teacher(family, tmp_path, num_hidden_layers=3)))
    options = {"feature_map": "prototype", "num_sinks": 3, "ring_bits": bits}
    recipe = Recipe("test", "hedgehog", [], student_options=options)
    types = layer_types(teacher, recipe, [1])
    kv_heads = teacher.family.student_config(teacher.config)["num_key_value_heads"]
    costs = budget_of(teacher, recipe, torch.float32, [4], context=100).costs(types)
    assert costs.attention == 100 * 2 * kv_heads * 8 * 4
    found = allocate(random_errors(3, 3, kv_heads), [0, 2], 8000, costs)
    own = {"window_sizes": found.window_sizes, "feature_widths": found.feature_widths}
    config = student_config(teacher, recipe, types, **own)
    assert found.state_bytes == state_bytes(config, torch.float32) <= 8000
    model, cache = causal_lm_class("hedgehog")(config), RecurrentCache(config)
    with torch.no_grad():
        model(torch.randint(3, 310, (1, 12)), cache=cache)
    assert found.state_bytes == sum(cache.states[i].num_bytes() for i in (0, 2))
