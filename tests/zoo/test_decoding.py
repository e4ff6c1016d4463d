"""Decoding by replay gives what the layers give, and stops where it could not."""

from __future__ import annotations

import copy

import pytest
import torch

from rnnzoo.zoo.core.cache import RecurrentCache
from rnnzoo.zoo.core.decoding import replaying

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
# Complex states, and steps that look at values.
AS_ALWAYS = {"lru", "gateloop", "s4", "s4d", "lssl", "block_lrnn", "tova"}


def tokens(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (batch, time), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def prefilled(model, batch: int) -> RecurrentCache:
    cache = RecurrentCache(model.config)
    model(tokens(batch, 7), cache=cache)
    return cache


@torch.no_grad()
def steps(model, cache: RecurrentCache, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(column, cache=cache).logits for column in ids.split(1, 1)], 1)


@pytest.fixture
def model(stack, make_model):
    if "hedgehog:rings" in stack or "hedgehog:widths" in stack:
        pytest.skip("rounding to a coarse grid makes a step of the grid of a difference in the last bit")
    return make_model(stack, torch.float32)


@pytest.mark.parametrize("batch", [1, 3])
def test_replayed_steps_equal_the_layers(model, stack, batch):
    ids, (expected, mine) = tokens(batch, 14, 1), (prefilled(model, batch), prefilled(model, batch))
    logits = steps(model, expected, ids)
    with replaying(model):
        replayed = steps(model, mine, ids)
        always = {i for i, name in enumerate(stack) if name.split(":")[0] in AS_ALWAYS}
        assert set(model.model.decoding.problems) == always, model.model.decoding.problems
    torch.testing.assert_close(replayed, logits, rtol=1e-4, atol=1e-4)
    # What the cache holds is good for going on without replay.
    torch.testing.assert_close(steps(model, mine, ids), steps(model, expected, ids), rtol=1e-4, atol=1e-4)
    assert mine.length == expected.length and torch.equal(mine.seen, expected.seen)


def test_generation_is_replayed_and_equals_generation_without_a_cache(model):
    ids = tokens(2, 7)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert model.model.decoding is None


SUPRA = ("supra", "full_attention", "mamba2")


def test_another_cache_or_another_batch_is_not_replayed(make_model):
    model = make_model(SUPRA, torch.float32)
    first, second, third = prefilled(model, 1), prefilled(model, 1), prefilled(model, 3)
    expected = [steps(model, copy.deepcopy(cache), tokens(len(cache.seen), 3)) for cache in (first, second, third)]
    with replaying(model):
        for cache, logits in zip((first, second, third), expected, strict=True):
            torch.testing.assert_close(steps(model, cache, tokens(len(cache.seen), 3)), logits, rtol=1e-4, atol=1e-4)


def test_a_state_that_was_put_into_the_cache_is_used(make_model):
    model = make_model(SUPRA, torch.float32)
    cache, other = prefilled(model, 2), prefilled(model, 2)
    with replaying(model), torch.no_grad():
        steps(model, cache, tokens(2, 3))
        cache.reorder_cache(torch.tensor([1, 0]))
        replayed = steps(model, cache, tokens(2, 2, 5))
    steps(model, other, tokens(2, 3))
    other.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(replayed, steps(model, other, tokens(2, 2, 5)), rtol=1e-4, atol=1e-4)


def test_several_tokens_between_steps_are_run_by_the_layers(make_model):
    model = make_model(SUPRA, torch.float32)
    cache, other = prefilled(model, 1), prefilled(model, 1)
    ids, results = tokens(1, 9, 3), []
    for held, context in ((cache, replaying(model)), (other, torch.no_grad())):
        with context, torch.no_grad():
            parts = [model(part, cache=held).logits for part in ids.split([1, 1, 4, 1, 1, 1], 1)]
        results.append(torch.cat(parts, 1))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_hooks_are_called_for_every_token(make_model):
    model, seen = make_model(SUPRA, torch.float32), []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    with replaying(model):
        steps(model, prefilled(model, 1), tokens(1, 5))
    assert len(seen) == 1 + 5


def test_an_adapter_that_is_switched_after_a_generation_counts_in_the_next(make_model):
    model = make_model(SUPRA, torch.float32)
    before = model.generate(tokens(1, 5), **GREEDY)
    with torch.no_grad():
        model.model.layers[0].mixer.proj.o_proj.weight.mul_(-3)
        model.model.layers[2].mixer.out_proj = torch.nn.Linear(64, 32)
    after = model.generate(tokens(1, 5), **GREEDY)
    assert torch.equal(after, model.generate(tokens(1, 5), use_cache=False, **GREEDY))
    assert not torch.equal(before, after)


def test_bfloat16_is_replayed(make_model):
    model = make_model(SUPRA, torch.bfloat16)
    expected = steps(model, prefilled(model, 1), tokens(1, 6))
    with replaying(model):
        replayed = steps(model, prefilled(model, 1), tokens(1, 6))
        assert not model.model.decoding.problems
    torch.testing.assert_close(replayed.float(), expected.float(), rtol=2e-2, atol=5e-2)


def test_hidden_states_are_all_there_when_they_are_asked_for(make_model):
    model = make_model(SUPRA, torch.float32)
    found = model.generate(tokens(1, 5), output_hidden_states=True, return_dict_in_generate=True, **GREEDY)
    assert all(len(step) == len(SUPRA) + 1 for step in found.hidden_states)
