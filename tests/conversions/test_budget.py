"""Costs are those of the state itself, and a budget too small for any choice is refused with the least one."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.stages.calibrate import Calibrate
from rnnzoo.conversions.student import budget_of, layer_types, student_config
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.sizes import state_bytes

from .tiny import tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return resolve_teacher(str(tiny_teacher("llama", tmp_path_factory.mktemp("t"))))


@pytest.mark.parametrize("options", [{}, {"ring_bits": [8, 4]}, {"feature_map": "prototype", "feature_width": 3}])
@pytest.mark.parametrize("keep", [[], [0]])
@pytest.mark.parametrize("chooses", [True, False])
def test_costs_add_up_to_the_bytes_of_the_state(teacher, options, keep, chooses):
    recipe = Recipe("test", "hedgehog", [], student_options={"num_sinks": 2} | options)
    types = layer_types(teacher, recipe, keep)
    costs = budget_of(teacher, recipe, torch.bfloat16, [4] if chooses else []).costs(types)
    sizes, widths = [[3, 5], [8, 1]], [6, 2]
    own = {"feature_widths": widths} if chooses else {}
    config = student_config(teacher, recipe, types, window_sizes=sizes, **own)
    expected = sum(
        costs.layer + costs.token * sum(sizes[i]) + 2 * widths[i] * costs.feature
        for i, kind in enumerate(types)
        if kind == "hedgehog"
    )
    assert state_bytes(config, torch.bfloat16) == expected
    assert (costs.feature > 0) == chooses and costs.attention is None


@pytest.mark.parametrize("widths", [[], [4, 8]])
def test_the_least_budget_is_named_and_suffices(teacher, widths):
    stages = [Calibrate("calibrate", feature_widths=widths)]
    options = {"feature_map": "prototype", "feature_width": 8}
    recipe = Recipe("test", "hedgehog", stages, student_options=options, state_budget=100)
    types = layer_types(teacher, recipe, [])
    own = {"feature_widths": [0, 0]} if widths else {}
    least = state_bytes(student_config(teacher, recipe, types, window_size=1, **own), torch.bfloat16)
    with pytest.raises(RnnzooError, match=f"100 bytes is too small: with windows of one token, .* takes {least:,} for"):
        budget_of(teacher, recipe, torch.bfloat16, widths).check(types)
    recipe.state_budget = least
    budget_of(teacher, recipe, torch.bfloat16, widths).check(types)
    recipe.state_budget = least - 1
    with pytest.raises(RnnzooError, match="too small"):
        budget_of(teacher, recipe, torch.bfloat16, widths).check(types)
