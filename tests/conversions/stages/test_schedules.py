"""Learning rates of a stage: warmup, course and end are what the recipe says."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from rnnzoo.conversions.stages.align import Align
from rnnzoo.conversions.stages.schedules import rate_factor


def factors(steps: int, peak: float = 1e-3, **settings) -> list[float]:
    return [rate_factor(Align("test", **settings), peak, step, steps) for step in range(steps + 1)]


@pytest.mark.parametrize("steps", [2, 7, 40])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_cosine_and_constant_are_those_of_transformers(steps, warmup):
    makers = {"cosine": get_cosine_schedule_with_warmup, "constant": get_constant_schedule_with_warmup}
    for schedule, make in makers.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        sizes = (math.ceil(warmup * steps), steps) if schedule == "cosine" else (math.ceil(warmup * steps),)
        theirs = make(optimizer, *sizes).lr_lambdas[0]
        ours = factors(steps, schedule=schedule, warmup=warmup)
        assert ours[:-1] == pytest.approx([theirs(step) for step in range(steps)])


def test_schedules_end_at_the_smallest_rate():
    """RADLADS: from 1e-3 to 1e-5 by a cosine."""
    rates = [1e-3 * factor for factor in factors(10, min_lr=1e-5, warmup=0.0)]
    assert rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-5)
    assert rates[5] == pytest.approx((1e-3 + 1e-5) / 2)
    straight = factors(10, schedule="linear", warmup=0.0, min_lr=1e-4)
    assert straight == pytest.approx([1 - 0.09 * step for step in range(11)])


def test_a_rate_below_the_smallest_stays_and_one_of_zero_does_too():
    assert factors(4, peak=1e-6, min_lr=1e-5, warmup=0.0) == [1.0] * 5
    assert factors(4, peak=0.0, warmup=0.0) == [1.0] * 5


def test_a_stage_of_one_step_has_its_rate_there():
    assert factors(1, warmup=0.5)[0] == 1.0
