"""Text without `--data`: sampled from the teacher, and found in the Python installation."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from rnnzoo.conversions.data import corpus_from_texts, default_corpus, python_prose, sampling
from rnnzoo.conversions.data import default as default_module
from rnnzoo.conversions.data.installed import _clean
from rnnzoo.conversions.data.prompts import TOPICS
from rnnzoo.conversions.data.sampling import sample_from_teacher
from rnnzoo.zoo.core.cache import CACHE_NAME

from .tiny import TINY_FAMILIES, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_samples_have_the_length_asked_for_and_follow_the_seed(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    seen = []
    options = dict(batch_size=3, max_new_tokens=200)
    texts = sample_from_teacher(model, tokenizer, 1000, progress=lambda *p: seen.append(p), **options)
    assert len(texts) == 6  # two batches of three
    assert all(text.startswith("<|im_start|>user\n") for text in texts)
    assert len(set(texts)) == 6
    assert seen[-1] == (1200, 1200)
    assert texts == sample_from_teacher(model, tokenizer, 1000, **options)
    assert texts != sample_from_teacher(model, tokenizer, 1000, seed=1, **options)
    assert model.config._attn_implementation == "sdpa"


def test_a_conversation_goes_on_with_a_question_where_the_teacher_stops(monkeypatch):
    monkeypatch.setattr(sampling, "TURN_TOKENS", (10, 20))
    text = sample_from_teacher(tiny_model(), tiny_tokenizer(), 500, batch_size=1, max_new_tokens=500)[0]
    turns = text.split("<|im_start|>")[1:]
    assert len(turns) > 4
    assert [turn.split("\n")[0] for turn in turns[:4]] == ["user", "assistant", "user", "assistant"]
    assert all(turn.rstrip().endswith("<|im_end|>") for turn in turns[:-1])
    assert "<|im_end|><|im_end|>" not in text


def test_a_base_model_continues_openings():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    texts = sample_from_teacher(tiny_model(), tokenizer, 400, batch_size=4, max_new_tokens=100)
    assert len(texts) == 4
    assert not any(text.startswith("<|im_start|>") for text in texts)
    assert sum(any(topic[1:] in text for topic in TOPICS) for text in texts) == 4


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_decoding_token_by_token_gives_the_teachers_logits(family):
    """The growing cache and the grouped attention change the speed and nothing else."""
    model = tiny_model(family).double()
    ids = torch.randint(3, 300, (2, 300))  # beyond one block of the cache
    cache = DynamicCache()
    cache.layers = [sampling._GrowingLayer() for _ in range(2)]
    with torch.no_grad():
        whole = model(ids).logits
        with sampling._decoding(model):
            steps = [model(ids[:, t : t + 1], use_cache=True, **{CACHE_NAME: cache}).logits for t in range(300)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_draws_follow_the_distribution_and_leave_out_the_tail():
    chances = torch.tensor([0.5, 0.3, 0.195, 0.005])
    logits = chances.log().repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor(sampling._drawn(logits, 0.0, generator)), minlength=4) / 20_000
    torch.testing.assert_close(counts, chances, atol=0.01, rtol=0)
    cut = torch.bincount(torch.tensor(sampling._drawn(logits, 0.02, generator)), minlength=4)
    assert cut[3] == 0
    assert (cut[:3] > 0).all()


def test_prose_is_told_from_code_tables_and_signatures():
    sentence = (
        "The method that is described here was used by most of the people who lived in the valley, and it is still "
        "in use today because there is no other way to do it when the river is high and the bridge is under water."
    )
    assert _clean(sentence.replace(" ", "\n", 5)) == sentence
    assert _clean(sentence.replace("method", ":meth:`~a.b.method`").replace("river", "``river``")) == sentence.replace(
        "method", "a.b.method"
    )
    for other in (
        ">>> " + sentence,
        "Args: " + sentence,
        sentence + " x = {1: 2}",
        "Short sentence that is not long enough.",
        sentence.rstrip("."),
        "Name Value Size Type Mean Deviation Count Total Rows Columns " * 4 + ".",
    ):
        assert _clean(other) == ""


@pytest.fixture
def few_files(monkeypatch):
    """The language reference alone: all of an installation takes ten seconds."""
    import pydoc_data.topics
    from pathlib import Path

    python_prose.cache_clear()
    files = [Path(pydoc_data.topics.__file__)]
    monkeypatch.setattr("rnnzoo.conversions.data.installed._files", lambda: files)
    yield
    python_prose.cache_clear()


def test_the_installation_holds_prose(few_files):
    texts = python_prose()
    paragraphs = [p for text in texts for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 200
    assert sum(len(p.split()) for p in paragraphs) > 10_000
    assert not any(">>>" in p or "::" in p for p in paragraphs)


def test_without_the_hub_the_default_is_prose_and_the_teachers_own_text(few_files, monkeypatch):
    monkeypatch.setattr(default_module, "hub_reachable", lambda: False)
    assert default_corpus(tiny_tokenizer()).source == default_module.PROSE_SOURCE
    corpus = default_corpus(tiny_tokenizer(), model=tiny_model(), sampled_tokens=600, sampled_length=100, seed=4)
    assert "600 tokens sampled from the teacher (seed 4)" in corpus.source
    texts = list(corpus.documents())
    assert sum(text.startswith("<|im_start|>") for text in texts) == 6
    assert len(texts) > 6


def test_a_hub_that_answers_but_fails_leads_to_the_built_in_text(few_files, monkeypatch, caplog):
    from rnnzoo.kernels.errors import RnnzooError

    def fails(*_, **__):
        raise RnnzooError("no such dataset")

    monkeypatch.setattr(default_module, "hub_reachable", lambda: True)
    monkeypatch.setattr(default_module, "open_corpus", fails)
    assert default_corpus(tiny_tokenizer()).source == default_module.PROSE_SOURCE
    assert "no such dataset" in caplog.text


def test_a_run_goes_on_with_the_text_that_it_has_begun_with(few_files, tmp_path, monkeypatch):
    """Begun without the Hub: the built-in text, though it answers later. Begun with it: a sentence while it is away."""
    from rnnzoo.kernels.errors import RnnzooError

    hub = corpus_from_texts(["A text of the Hub."] * 3, default_module.HUB_DATASET)
    monkeypatch.setattr(default_module, "open_corpus", lambda *_, **__: hub)
    for reachable, source in ((False, default_module.PROSE_SOURCE), (True, default_module.HUB_DATASET)):
        record = tmp_path / f"{reachable}.json"
        monkeypatch.setattr(default_module, "hub_reachable", lambda reachable=reachable: reachable)
        assert default_corpus(tiny_tokenizer(), record=record).source == source
    assert default_corpus(tiny_tokenizer(), record=tmp_path / "False.json").source == default_module.PROSE_SOURCE
    monkeypatch.setattr(default_module, "hub_reachable", lambda: False)
    with pytest.raises(RnnzooError, match="begun with text of the Hub .*, and the Hub is not reachable: run"):
        default_corpus(tiny_tokenizer(), record=tmp_path / "True.json")
