"""generate(): every decoding of transformers gives what it gives for an attention model, in constant memory."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.cache import CACHE_NAME, RecurrentCache
from rnnzoo.zoo.core.heads import RecurrentForSequenceClassification
from rnnzoo.zoo.core.registry import mixer_class
from rnnzoo.zoo.mamba2.configuration_mamba2 import Mamba2Config
from rnnzoo.zoo.mamba2.modeling_mamba2 import Mamba2ForCausalLM

GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
NAMES = ["cache", "past_key_values", "cache_params"]


@pytest.fixture
def model(stack, make_model):
    return make_model(stack)


def prompt(batch: int = 1, time: int = 7) -> torch.Tensor:
    return torch.randint(3, 61, (batch, time), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def recomputed(model, ids, steps):
    """Greedy decoding without any cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_greedy_with_cache_equals_recomputing_everything(model):
    ids = prompt(2)
    expected = recomputed(model, ids, 10)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)
    assert torch.equal(model.generate(ids, prefill_chunk_size=3, **GREEDY), expected)


def test_left_padded_batch_equals_single_prompts(model):
    rows = [prompt(time=n) for n in (2, 5, 7)]
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (width - r.shape[1], 0)) for r in rows])
    together = model.generate(ids, attention_mask=mask, **GREEDY)[:, width:]
    for row, continuation in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row, **GREEDY)[0, row.shape[1] :], continuation)


def test_beam_search_with_cache_equals_without(model):
    ids = prompt(2)
    arguments = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments))


def test_sampling_with_cache_equals_without(model):
    arguments = GREEDY | {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(0)
    cached = model.generate(prompt(), **arguments)
    torch.manual_seed(0)
    assert torch.equal(cached, model.generate(prompt(), use_cache=False, **arguments))


def test_prompt_lookup_equals_greedy(model):
    ids = prompt().repeat(1, 3)
    expected = recomputed(model, ids, 24)
    found = model.generate(ids, prompt_lookup_num_tokens=4, **(GREEDY | {"max_new_tokens": 24}))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_assisted_decoding_equals_greedy(stack, make_model, seed):
    # The same seed: every draft is accepted. Another seed: nearly all are taken back.
    model, draft = make_model(stack), make_model(stack, seed=seed)
    assert torch.equal(model.generate(prompt(), assistant_model=draft, **GREEDY), recomputed(model, prompt(), 10))


def test_a_cache_from_one_call_continues_the_conversation_in_the_next(model):
    first = model.generate(prompt(), return_dict_in_generate=True, **GREEDY)
    asked = torch.cat([first.sequences, prompt(time=3)], 1)
    second = model.generate(asked, **{CACHE_NAME: first[CACHE_NAME]}, **GREEDY)
    assert torch.equal(second, recomputed(model, asked, 10))


def test_generation_from_embeddings_equals_generation_from_tokens(model):
    ids = prompt(2)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), model.generate(ids, **GREEDY)[:, ids.shape[1] :])


def test_recurrent_states_have_the_same_size_at_any_length(stack, make_model):
    model = make_model(stack)
    sizes = [model(prompt(time=n), use_cache=True)[CACHE_NAME].num_bytes() for n in (8, 16, 64)]
    growing = any(mixer_class(name.split(":")[0]).complexity.endswith("/ T") for name in stack)
    assert (sizes[0] == sizes[1] == sizes[2]) == (not growing)
    assert all(size > 0 for size in sizes)


def test_a_class_whose_name_contains_mamba_generates():
    # transformers up to 5.23 gives such classes their cache under another name.
    torch.manual_seed(0)
    config = Mamba2Config(vocab_size=61, hidden_size=32, num_hidden_layers=2, ssm_state_size=8, initializer_range=0.2)
    model = Mamba2ForCausalLM(config).double().eval()
    expected = recomputed(model, prompt(), 10)
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert torch.equal(model.generate(prompt(), prompt_lookup_num_tokens=3, **GREEDY), expected)
    cache = RecurrentCache(config)
    with torch.no_grad():
        model(prompt()[:, :4], cache_params=cache)
    assert torch.equal(model.generate(prompt(), cache_params=cache, **GREEDY), expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_cache_is_taken_under_every_name_it_ever_had(make_model, name):
    model = make_model(("mamba2", "supra"))
    cache = RecurrentCache(model.config)
    model(prompt()[:, :4], **{name: cache})
    assert cache.get_seq_length() == 4
    torch.testing.assert_close(model(prompt()[:, 4:], **{name: cache}).logits, model(prompt()).logits[:, 4:])
    bare = RecurrentCache(model.config)
    model.model(prompt(), **{name: bare})
    assert bare.get_seq_length() == 7


@pytest.mark.parametrize("name", NAMES)
def test_generate_continues_a_cache_under_every_name_it_ever_had(make_model, name):
    model = make_model(("mamba2", "supra"))
    cache = RecurrentCache(model.config)
    with torch.no_grad():
        model(prompt()[:, :4], cache=cache)
    assert torch.equal(model.generate(prompt(), **{name: cache}, **GREEDY), recomputed(model, prompt(), 10))
    assert cache.get_seq_length() == 16


def test_a_cache_is_returned_under_every_name_that_the_installed_transformers_knows(make_model):
    model = make_model(("mamba2", "supra"))
    generated = model.generate(prompt(), return_dict_in_generate=True, **GREEDY)
    for output in (model(prompt(), use_cache=True), model.model(prompt(), use_cache=True), generated):
        known = [name for name in NAMES if hasattr(output, name)]
        assert CACHE_NAME in known and "past_key_values" in known
        assert all(isinstance(getattr(output, name), RecurrentCache) for name in known)


def test_no_deprecated_name_of_the_cache_is_used(make_model, monkeypatch):
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda logger, message, *args: said.append(message))
    model = make_model(("mamba2", "supra"))
    classifier = RecurrentForSequenceClassification(model.config).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = RecurrentCache(model.config)
        model(prompt(), cache=cache, use_cache=True)
        classifier(prompt(), use_cache=True)
        model.generate(prompt(2), num_beams=2, **GREEDY)
        model.generate(prompt(), prompt_lookup_num_tokens=3, **GREEDY)
        model.generate(torch.cat([prompt(), prompt(time=2)], 1), **{CACHE_NAME: cache}, **GREEDY)
        model.train()(prompt(), labels=prompt(), use_cache=True).loss.backward()
    assert not [message for message in said if "past_key_values" in message]


def test_foreign_caches_are_refused_in_one_sentence(make_model):
    model = make_model(("supra",))
    with pytest.raises(RnnzooError, match="DynamicCache.*RecurrentCache"):
        model(prompt(), cache=transformers.DynamicCache())
    with pytest.raises(RnnzooError, match="cache_implementation='static'"):
        model.generate(prompt(), cache_implementation="static", **GREEDY)


def test_cropping_what_was_not_recorded_is_refused(make_model):
    model = make_model(("supra",))
    cache = model(prompt(), use_cache=True)[CACHE_NAME]
    cache.crop(0)
    with pytest.raises(RnnzooError, match="remove 2 tokens, but 0 were recorded"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


@torch.no_grad()
def test_rows_of_a_cache_can_be_repeated_and_selected(model):
    ids, more = prompt(2), prompt(2, 3)
    cache = model(ids, use_cache=True)[CACHE_NAME]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    expected = model(torch.cat([ids, more], 1)).logits[:, -3:]
    torch.testing.assert_close(model(more, cache=cache).logits, expected)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.num_bytes() == 0
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits)


@torch.no_grad()
def test_decoding_keeps_to_the_memory_of_the_state_unless_a_rollback_needs_it(make_model):
    model = make_model(["mamba2", "supra"])
    cache = RecurrentCache(model.config)
    model(prompt(), cache=cache)
    where = [x.data_ptr() for x in cache.states[0].tensors()]
    model(prompt(time=1), cache=cache)
    assert [x.data_ptr() for x in cache.states[0].tensors()] == where
    before = [x.clone() for x in cache.states[0].tensors()]
    cache.activate_past_recording()
    model(prompt(time=1), cache=cache)
    cache.crop(-1)
    assert all(torch.equal(x, y) for x, y in zip(cache.states[0].tensors(), before, strict=True))
