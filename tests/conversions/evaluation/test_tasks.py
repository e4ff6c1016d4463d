"""Last word and minimal pairs: batches with padding give what one sequence at a time gives."""

from __future__ import annotations

import math

import pytest
import torch

from rnnzoo.conversions.evaluation.tasks import last_word, minimal_pairs, score_continuations
from rnnzoo.kernels.errors import RnnzooError

from ..tiny import tiny_model, tiny_tokenizer

PASSAGES = [
    {"context": "the king and the queen walked to the old", "target": "gate"},
    {"context": "in", "target": "that"},
    {"context": "it was for the best, he said; it is on the table with all of the other", "target": "things"},
]
PAIRS = [
    {"sentence_good": "The cats sleep on the mat.", "sentence_bad": "The cats sleeps on the mat at noon."},
    {"sentence_good": "Who was that?", "sentence_bad": "Who that was?"},
    {"sentence_good": "It is in there.", "sentence_bad": "It in is there."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def model(request):
    return tiny_model(request.param).eval()


@torch.no_grad()
def direct(model, context, continuation):
    ids = torch.tensor([context + continuation])
    scores = model(ids).logits[0].float().log_softmax(-1)[len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    return scores.gather(-1, targets[:, None]).sum().item(), bool((scores.argmax(-1) == targets).all())


def test_a_padded_batch_scores_like_single_sequences(model):
    sequences = [([1, 5, 9], [7]), ([1], [30, 31, 32, 33, 34, 35]), (list(range(3, 60)), [8, 9])]
    for found, (context, continuation) in zip(score_continuations(model, sequences), sequences, strict=True):
        total, greedy = direct(model, context, continuation)
        assert found[0] == pytest.approx(total, abs=1e-3) and found[1] == greedy


def test_the_last_word_is_right_when_greedy_decoding_gives_all_of_it(model, tokenizer):
    bos = [tokenizer.bos_token_id]
    items = list(PASSAGES)
    found = last_word(model, tokenizer, items)
    expected = []
    for item in items:
        before = tokenizer(item["context"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(item["context"] + " " + item["target"], add_special_tokens=False)["input_ids"]
        expected.append(direct(model, bos + whole[: len(before)], whole[len(before) :]))
    assert found.n == 3 and found.value == pytest.approx(sum(right for _, right in expected) / 3)
    assert found.perplexity == pytest.approx(math.exp(-sum(score for score, _ in expected) / 3), rel=1e-3)


def test_a_pair_is_right_when_the_good_sentence_is_more_probable(model, tokenizer):
    found = minimal_pairs(model, tokenizer, PAIRS)
    right = 0
    for pair in PAIRS:
        good, bad = (
            direct(model, [tokenizer.bos_token_id], tokenizer(pair[f], add_special_tokens=False)["input_ids"])[0]
            for f in ("sentence_good", "sentence_bad")
        )
        right += good > bad
    assert found.value == pytest.approx(right / 3) and found.chance == 0.5
    assert found.stderr == pytest.approx(math.sqrt(found.value * (1 - found.value) / 3))


def test_a_limit_takes_items_from_the_whole_file(model, tokenizer):
    assert minimal_pairs(model, tokenizer, PAIRS * 10, max_items=7).n == 7


def test_no_items_are_refused(model, tokenizer):
    with pytest.raises(RnnzooError, match="no items"):
        last_word(model, tokenizer, [])
