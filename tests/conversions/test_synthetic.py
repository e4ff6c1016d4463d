"""The made-up tasks: every label is what an evaluation of the sequence by other means says."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.data.synthetic import LANGUAGES, NO_ANSWER, mqar
from rnnzoo.kernels.errors import RnnzooError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_parity(word: list[int]) -> int:
    return word.count(1) % 2


def in_even_pairs(word: list[int]) -> int:
    return int(sum(a != b for a, b in zip(word, word[1:], strict=False)) % 2 == 0)


def value_modulo_5(word: list[int]) -> int:
    return eval("".join("01234+-*"[symbol] for symbol in word)) % 5


ORACLES = {"parity": in_parity, "even_pairs": in_even_pairs, "modular_arithmetic": value_modulo_5}


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_every_answer_is_that_of_the_prefix(name, length):
    drawn = LANGUAGES[name](50, length, generator())
    for word, labels in zip(drawn.input_ids.tolist(), drawn.labels.tolist(), strict=True):
        for t, label in enumerate(labels):
            if name == "modular_arithmetic" and t % 2:
                assert label == NO_ANSWER
            else:
                assert label == ORACLES[name](word[: t + 1])


@pytest.mark.parametrize("name", LANGUAGES)
def test_answers_are_balanced_and_fixed_by_the_seed(name):
    drawn, again = (LANGUAGES[name](2000, 21, generator(3)) for _ in range(2))
    assert torch.equal(drawn.input_ids, again.input_ids) and torch.equal(drawn.labels, again.labels)
    shares = torch.bincount(drawn.labels[:, -1]) / 2000
    assert shares.max() < 0.55 and int(drawn.input_ids.max()) == {"modular_arithmetic": 7}.get(name, 1)


@pytest.mark.parametrize(("length", "pairs", "power"), [(64, 8, 0.01), (32, 8, 0.01), (61, 4, 1.0)])
def test_every_key_is_asked_for_once_and_its_value_is_the_answer(length, pairs, power):
    drawn = mqar(40, length, pairs, vocab_size=32, power=power, generator=generator())
    for row, labels in zip(drawn.input_ids.tolist(), drawn.labels.tolist(), strict=True):
        told = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs and all(0 < key < 16 <= value for key, value in told.items())
        asked = [t for t, label in enumerate(labels) if label != NO_ANSWER]
        assert min(asked) >= 2 * pairs and sorted(row[t] for t in asked) == sorted(told)
        assert all(labels[t] == told[row[t]] == row[t + 1] for t in asked)
        spoken = {*asked, *(t + 1 for t in asked)}
        assert all(row[t] == 0 for t in range(2 * pairs, length) if t not in spoken)


def test_a_small_power_asks_soon():
    def mean_place(power: float) -> float:
        labels = mqar(200, 128, 4, vocab_size=32, power=power, generator=generator()).labels
        return float((labels != NO_ANSWER).nonzero()[:, 1].float().mean())

    assert mean_place(0.01) < mean_place(1.0) - 20


def test_what_does_not_fit_is_refused():
    with pytest.raises(RnnzooError, match="need 32 tokens"):
        mqar(2, 31, 8, vocab_size=64, generator=generator())
    with pytest.raises(RnnzooError, match="symbols"):
        mqar(2, 64, 8, vocab_size=16, generator=generator())
