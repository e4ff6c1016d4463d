"""Made-up tasks that tell architectures apart: associative recall, and regular languages.

Each gives sequences with an answer at some positions. The answer to a prefix stands at its last token, unshifted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.errors import RnnzooError

__all__ = ["LANGUAGES", "MODULUS", "NO_ANSWER", "Answers", "even_pairs", "modular_arithmetic", "mqar", "parity"]

NO_ANSWER = -100
MODULUS = 5
PLUS, MINUS, TIMES = 5, 6, 7  # after the digits 0 to 4


@dataclass(frozen=True)
class Answers:
    """input_ids and labels, (B, T) int64; labels are NO_ANSWER where nothing is asked."""

    input_ids: Tensor
    labels: Tensor


def mqar(
    batch: int, length: int, pairs: int, *, vocab_size: int, power: float = 0.01, generator: torch.Generator
) -> Answers:
    """Multi-query associative recall (Arora et al. 2023, "Zoology", section 3 and appendix).

        k1 v1 k2 v2 ... kn vn   0 0 k2 v2 0 0 0 0 k1 v1 ...        asked at every key of the second part: its value

    Every key is asked for once. Keys are 1 to vocab_size/2 - 1, values the upper half; 0 fills.

    Args:
        pairs: n. power: a in P(gap) ~ gap^(a - 1), the gaps being counted in places of two tokens after the pairs;
            small values ask soon, 1 anywhere.
    Raises:
        RnnzooError: more pairs than keys, or a length that does not hold them.
    """
    half = vocab_size // 2
    if pairs >= half or length < 4 * pairs:
        raise RnnzooError(
            f"{pairs} pairs need {4 * pairs} tokens and over {2 * pairs + 2} symbols; got {length}, {vocab_size}."
        )
    keys = torch.rand(batch, half - 1, generator=generator).argsort(1)[:, :pairs] + 1
    values = torch.randint(half, vocab_size, (batch, pairs), generator=generator)
    places = (length - 2 * pairs) // 2
    chance = torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1)
    asked = 2 * pairs + 2 * torch.multinomial(chance.expand(batch, -1), pairs, generator=generator)
    ids = torch.zeros(batch, length, dtype=torch.long)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    ids.scatter_(1, asked, keys).scatter_(1, asked + 1, values)
    labels = torch.full_like(ids, NO_ANSWER).scatter_(1, asked, values)
    return Answers(ids, labels)


def parity(batch: int, length: int, generator: torch.Generator) -> Answers:
    """Words over {0, 1}: is the number of ones so far odd?"""
    ids = torch.randint(2, (batch, length), generator=generator)
    return Answers(ids, ids.cumsum(1) % 2)


def even_pairs(batch: int, length: int, generator: torch.Generator) -> Answers:
    """Words over {0, 1}: is the number of 01 and 10 so far even? (It is where first and last symbol are the same.)"""
    ids = torch.randint(2, (batch, length), generator=generator)
    return Answers(ids, (ids == ids[:, :1]).long())


def modular_arithmetic(batch: int, length: int, generator: torch.Generator) -> Answers:
    """Digits 0 to 4 and, between them, +, -, x (5, 6, 7), no brackets: the value so far modulo 5, asked at each digit.

    Multiplication binds more tightly, as in Delétang et al. 2022 ("Neural Networks and the Chomsky Hierarchy").
    """
    ids = torch.randint(MODULUS, (batch, length), generator=generator)
    ids[:, 1::2] = torch.randint(PLUS, TIMES + 1, (batch, length // 2), generator=generator)
    labels = torch.full_like(ids, NO_ANSWER)
    total = torch.zeros(batch, dtype=torch.long)  # of the terms before the current one
    term = ids[:, 0]
    labels[:, 0] = term
    for t in range(2, length, 2):
        digit, sign = ids[:, t], ids[:, t - 1]
        total = torch.where(sign == TIMES, total, total + term)
        term = torch.where(sign == TIMES, term * digit, torch.where(sign == PLUS, digit, -digit)) % MODULUS
        labels[:, t] = (total + term) % MODULUS
    return Answers(ids, labels)


LANGUAGES = {"parity": parity, "even_pairs": even_pairs, "modular_arithmetic": modular_arithmetic}
"""The languages, each a function (batch, length, generator) -> Answers over at most 8 symbols."""
