"""Recall asks at the exact distance; decoding counts the bytes that are there."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.evaluation import recall as module
from rnnzoo.conversions.evaluation.decode import decode
from rnnzoo.conversions.evaluation.recall import build_stream, filler_text, recall
from rnnzoo.conversions.evaluation.scoring import Stream, encode
from rnnzoo.conversions.evaluation.window_baseline import kv_bytes_per_token, window_attention
from rnnzoo.kernels.errors import RnnzooError

from ..tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def filler(tokenizer):
    return encode(tokenizer, filler_text(400))[0].tolist()


@pytest.mark.parametrize("distance", [64, 100, 900])
def test_the_answer_lies_exactly_the_distance_back(tokenizer, filler, distance):
    built = build_stream(tokenizer, filler, facts=5, length=2500, seed=3)
    assert len(built.tokens) == 2500
    for fact in built.facts:
        read = [*built.tokens[: fact.asked_after(distance)], *fact.question]
        # The next token to predict is the answer's first, which was read exactly `distance` tokens before.
        place = len(read) - distance
        assert tuple(read[place : place + len(fact.answer)]) == fact.answer
        assert tuple(read[place - len(fact.question) : place]) == fact.question
        assert tokenizer.decode(fact.answer).strip() in module._WORDS


def test_the_choice_is_among_ten_different_words_of_which_one_is_right(tokenizer, filler):
    for fact in build_stream(tokenizer, filler, facts=12, length=0, seed=1).facts:
        assert len(fact.others) == module.CANDIDATES - 1
        assert len({fact.answer, *fact.others}) == module.CANDIDATES


def test_a_seed_fixes_the_stream(tokenizer, filler):
    first, again, other = (build_stream(tokenizer, filler, facts=4, length=900, seed=s) for s in (1, 1, 2))
    assert first == again and first != other


def test_the_made_up_filler_holds_no_word_of_the_facts():
    assert not set(filler_text().lower().replace(".", "").split()) & set(module._WORDS)


def test_too_little_filler_is_refused(tokenizer, filler):
    with pytest.raises(RnnzooError, match="too short"):
        build_stream(tokenizer, filler[:100], facts=4, length=5000, seed=0)


def test_a_model_that_remembers_is_right_and_one_that_does_not_is_at_chance(tokenizer, monkeypatch):
    """The verdicts of an ideal reader of the last 300 tokens: right within, wrong beyond."""

    class Reader(Stream):
        def __init__(self, model):
            self.model, self.history, self.seen = model, [], 0

        def advance(self, ids):
            self.history = [*self.history, *ids[0].tolist()]
            self.seen += ids.shape[1]

        def fork(self, copies=1):
            other = Reader(self.model)
            other.history, other.seen = list(self.history), self.seen
            return other

    def ideal(stream, fact):
        stream.advance(torch.tensor([fact.question]))
        recent = stream.history[-300:]
        width = len(fact.question) + len(fact.answer)
        wanted = (*fact.question, *fact.answer)
        return any(tuple(recent[i : i + width]) == wanted for i in range(len(recent)))

    monkeypatch.setattr(module, "Stream", Reader)
    monkeypatch.setattr(module, "_answers", ideal)
    points = recall(tiny_model("llama"), tokenizer, distances=(8, 100, 200, 400, 1000), facts=4, streams=2)
    assert [(p.distance, p.accuracy, p.n) for p in points] == [(100, 1, 8), (200, 1, 8), (400, 0, 8), (1000, 0, 8)]


@pytest.mark.parametrize("windowed", [False, True])
def test_candidates_are_scored_as_whole_words_without_disturbing_the_stream(tokenizer, filler, windowed):
    model = tiny_model("llama", max_position_embeddings=2048).eval()
    built = build_stream(tokenizer, filler, facts=3, length=300, seed=0)

    @torch.no_grad()
    def plain(fact):
        context = [*built.tokens, *fact.question]
        scores = []
        for word in (fact.answer, *fact.others):
            log_probs = model(torch.tensor([[*context, *word]])).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[len(context) - 1 + i, token].item() for i, token in enumerate(word)))
        return scores[0] > max(scores[1:])

    def check():
        stream = Stream(model)
        stream.advance(torch.tensor([built.tokens]))
        before = stream.state_bytes()
        assert [module._answers(stream.fork(), fact) for fact in built.facts] == [plain(f) for f in built.facts]
        assert stream.state_bytes() == before and stream.seen == 300

    if windowed:
        with window_attention(model, 40):
            check()
    else:
        check()


def test_recall_runs_with_made_up_filler(tokenizer):
    model = tiny_model("llama", max_position_embeddings=4096).eval()
    points = recall(model, tokenizer, distances=(16, 128, 512), facts=3, streams=1)
    assert [p.distance for p in points] == [128, 512]  # 16 byte-level tokens do not hold the question
    assert all(p.n == 3 and p.chance == 0.1 for p in points)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_decoding_counts_the_bytes_of_keys_and_values(family):
    model = tiny_model(family).to(torch.bfloat16).eval()
    points = decode(model, contexts=(32, 128), steps=3, warmup=1)
    assert [p.state_bytes for p in points] == [kv_bytes_per_token(model.config) * n for n in (32, 128)]
    assert all(p.tokens_per_second > 0 and p.context_kind.startswith("random") for p in points)


def test_a_windows_bytes_do_not_grow():
    model = tiny_model("llama").eval()
    with window_attention(model, 13, 4):
        points = decode(model, contexts=(64, 400), steps=2, warmup=1)
    # The step to come adds the one token that fills window and sinks.
    assert {p.state_bytes for p in points} == {kv_bytes_per_token(model.config, torch.float32) * 16}


def test_a_sliding_teachers_cache_is_filled_to_its_window():
    model = tiny_model("mistral", sliding_window=16).eval()
    points = decode(model, contexts=(64,), steps=2, warmup=1)
    assert points[0].state_bytes == kv_bytes_per_token(model.config, torch.float32) * 15


def test_a_student_reads_its_context_and_its_bytes_are_the_caches():
    from rnnzoo.zoo.supra.configuration_supra import SupraConfig
    from rnnzoo.zoo.supra.modeling_supra import SupraForCausalLM

    model = SupraForCausalLM(SupraConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)).eval()
    points = decode(model, contexts=(40, 90), steps=2, warmup=1, chunk=32)
    stream = Stream(model)
    stream.advance(torch.ones(1, 5, dtype=torch.long))
    assert {p.state_bytes for p in points} == {stream.cache.num_bytes()}
    assert {p.context_kind for p in points} == {"read"}
