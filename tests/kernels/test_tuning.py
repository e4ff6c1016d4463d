"""Block sizes that RNNZOO_AUTOTUNE=1 may choose for a Triton kernel: each gives what the rule's gives."""

from __future__ import annotations

import importlib

import pytest
import torch

from rnnzoo.kernels.dispatch import backends

from .recurrences import Shape, assert_close, cast, inputs_of, random_steps, recurrences, run

TUNED = {"linear_scan": "real", "selective_scan": "", "softmax_scan": "channel decay bonus", "short_conv": "silu"}


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("every", [pytest.param(False, id="two"), pytest.param(True, id="all", marks=pytest.mark.slow)])
def test_every_size_that_is_tried_gives_the_same(name, every, monkeypatch):
    recurrence = next(recurrence for recurrence in recurrences() if recurrence.name == name)
    reason = {status.backend: status.reason for status in backends(name)}["triton"]
    if reason:
        pytest.skip(reason)
    variant = TUNED[name] if TUNED[name] in recurrence.variants else recurrence.variants[0]
    time = 35 if every else 7
    inputs = cast(recurrence, inputs_of(recurrence, Shape(1, time, 1, 130), variant, 0), torch.float32)
    steps = random_steps(1, time, 0.2, 0.2)
    expected = run(recurrence, inputs, variant, "reference", **steps)
    module = importlib.import_module(f"rnnzoo.kernels.{name}.triton_")
    chosen, tried, keys = 0, [], []

    def tuned(kernel, key, rule, candidates=(), launch=None):
        """As with a GPU, where the sizes are timed before one of them is used."""
        sizes = [rule, *candidates][chosen]
        launch(rule)
        tried.append(len(candidates))
        keys.append((kernel, *key))
        return sizes

    monkeypatch.setattr(module, "tuned", tuned)
    assert_close(run(recurrence, inputs, variant, "triton", **steps), expected, 1e-5)
    assert len(keys) == 2 and keys[0] != keys[1], "forward and backward are tuned each for itself"
    assert not any(time in key for key in keys), "a new length is not tuned again"
    for chosen in range(1, min(tried) + 1) if every else (1, min(tried)):  # noqa: B007 (`tuned` reads it)
        assert_close(run(recurrence, inputs, variant, "triton", **steps), expected, 1e-5)
