"""Recall by distance: a fact is read, so many tokens later it is asked for.

One stream of filler text holds several facts, each a random phrase of four words ("Silver kitten ladder lemon.") in a
line of its own. A phrase is then begun again, such that its last word was read exactly `distance` tokens before the
place where it belongs now, and the model is asked which of ten words follows: the right one or one of nine others, last
words of the stream's other phrases as far as there are enough. Chance is 1 in 10, and a model that has forgotten the
phrase does no better. The question is put to a copy of the model's cache, so the stream goes on as if nothing had been
asked, and reading a stream once serves every fact and every distance.

Why phrases and not a pass key: copying after a repeated beginning is what small models do well. A Transformer of 135M
parameters stays far above chance over its trained length, so that what is lost is lost by the memory, not by the task.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...kernels.errors import RnnzooError
from .scoring import Progress, Stream, encode, log_probs, no_progress

__all__ = ["CANDIDATES", "DISTANCES", "Fact", "RecallPoint", "RecallStream", "build_stream", "filler_text", "recall"]

DISTANCES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CANDIDATES = 10
_LEAD = 32  # filler tokens before the first fact
_GAP = 48  # filler tokens between facts

_WORD_LIST = """
    apple arrow badge banana barrel basket beetle blanket bottle bridge bronze bucket butter button cabin camel
    candle canvas carpet castle cherry circle clover cotton cradle crystal curtain diamond dragon drum eagle
    engine falcon feather fence finger forest fossil garden garlic ginger goat granite guitar hammer harbor
    helmet hockey honey horse island ivory jacket jungle kettle kitten ladder lantern lemon leopard lizard
    magnet maple marble meadow mirror monkey mountain mushroom mustard needle oak ocean olive onion orange
    orchid oyster paddle panther parrot pearl pencil pepper piano pigeon pillow planet pocket pony potato
    pumpkin puzzle quartz rabbit ribbon river rocket saddle salmon sapphire scarf shadow silver snail spider
    spoon squirrel statue sugar sunset tiger timber tobacco tomato trumpet tulip tunnel turtle umbrella velvet
    violin wagon walnut whale whistle willow window wolf yellow zebra
"""
_WORDS = tuple(_WORD_LIST.split())
_MADE_UP = (  # subjects, verbs, objects and times of the made-up prose; none of the words above
    ("The doctor", "My neighbour", "An old teacher", "The committee", "Her brother", "A young lawyer", "The mayor"),
    ("wrote about", "asked about", "remembered", "described", "argued over", "returned to", "paid for", "read about"),
    ("the meeting", "a long journey", "the new law", "the weather", "an early train", "the price of bread"),
    ("in the morning", "last winter", "before the war", "after dinner", "on Tuesday", "for many years", "without hope"),
)


@dataclass(frozen=True)
class Fact:
    """A phrase in a stream.

    Attributes:
        at: index of the answer's first token. question: tokens that begin the phrase again. others: wrong answers.
    """

    at: int
    question: tuple[int, ...]
    answer: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]

    def asked_after(self, distance: int) -> int:
        """How many tokens of the stream are read before the question, for the answer to be `distance` tokens back."""
        return self.at + distance - len(self.question)


@dataclass(frozen=True)
class RecallStream:
    tokens: tuple[int, ...]
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class RecallPoint:
    distance: int
    accuracy: float
    stderr: float
    n: int
    chance: float = 1 / CANDIDATES


def filler_text(sentences: int = 1500, seed: int = 0) -> str:
    """Plain made-up prose, for use where no text is given. The words of the facts do not occur in it."""
    rng = random.Random(seed)
    return " ".join(" ".join(rng.choice(part) for part in _MADE_UP) + "." for _ in range(sentences))


def build_stream(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], *, facts: int, length: int, seed: int, lead: int = _LEAD
) -> RecallStream:
    """A stream of at least `length` tokens, `facts` phrases after `lead` tokens; every word is used in one phrase only.

    Raises:
        RnnzooError: too little filler, or more facts than there are words for.
    """
    if not 1 <= facts <= len(_WORDS) // 4 - CANDIDATES:
        raise RnnzooError(f"facts must be from 1 to {len(_WORDS) // 4 - CANDIDATES}, not {facts}.")
    rng = random.Random(seed)
    words = rng.sample(_WORDS, len(_WORDS))

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    cues = [tokens("\n\n" + " ".join(words[3 * i : 3 * i + 3]).capitalize()) for i in range(facts)]
    pool = [tuple(tokens(f" {word}")) for word in words[3 * facts :]]
    answers, spare = pool[:facts], pool[facts:]
    rest = iter(filler)
    stream: list[int] = _take(rest, lead)
    placed = []
    for index, (cue, answer) in enumerate(zip(cues, answers, strict=True)):
        others = [a for i, a in enumerate(answers) if i != index and a != answer]
        rng.shuffle(others)
        others = [*others, *(a for a in spare if a != answer)][: CANDIDATES - 1]
        placed.append(Fact(len(stream) + len(cue), tuple(cue), answer, tuple(others)))
        stream += [*cue, *answer, *tokens(".\n\n"), *_take(rest, _GAP)]
    stream += _take(rest, max(0, length - len(stream)))
    return RecallStream(tuple(stream), tuple(placed))


def _take(rest: Any, count: int) -> list[int]:
    taken = [token for _, token in zip(range(count), rest, strict=False)]
    if len(taken) < count:
        raise RnnzooError("The filler text is too short for this distance: give a longer text or a smaller distance.")
    return taken


@torch.no_grad()
def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    filler: str | None = None,
    distances: Sequence[int] = DISTANCES,
    facts: int = 8,
    streams: int = 2,
    lead: int = _LEAD,
    chunk: int = 1024,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[RecallPoint]:
    """Accuracy of the forced choice at each distance, n = facts x streams.

    Args:
        filler: text between and after the facts; None, or too short a text: made-up prose.
        distances: tokens from the answer to its repetition. Those too short for the question itself, as this tokenizer
            cuts it, are left out.
        lead: filler tokens before the first fact.
        seed: fixes phrases and candidates; the same seed gives every model with this tokenizer the same questions.
    """
    longest = max(distances)
    needed = longest + facts * (_GAP + 64) + lead
    texts = _filler_tokens(tokenizer, filler, needed)
    right: dict[int, list[bool]] = {distance: [] for distance in sorted(distances)}
    for number in range(streams):
        offset = (number * needed) % max(1, len(texts) - needed + 1)
        built = build_stream(
            tokenizer, texts[offset:], facts=facts, length=needed, seed=seed * 1000 + number, lead=lead
        )
        questions = sorted(
            (fact.asked_after(distance), distance, index)
            for index, fact in enumerate(built.facts)
            for distance in right
            if distance >= len(fact.question) + len(fact.answer)
        )
        stream = Stream(model)
        for when, distance, index in questions:
            while stream.seen < when:
                stop = min(stream.seen + chunk, when)
                ids = torch.tensor([built.tokens[stream.seen : stop]], device=model.device)
                stream.advance(ids)
            right[distance].append(_answers(stream.fork(), built.facts[index]))
            progress("recall", number * needed + stream.seen, streams * needed, {"distance": distance})
    progress("recall", streams * needed, streams * needed, {})
    points = []
    for distance, outcomes in right.items():
        if len(outcomes) == facts * streams:
            accuracy = sum(outcomes) / len(outcomes)
            error = math.sqrt(accuracy * (1 - accuracy) / len(outcomes))
            points.append(RecallPoint(distance, accuracy, error, len(outcomes)))
    return points


def _filler_tokens(tokenizer: PreTrainedTokenizerBase, filler: str | None, needed: int) -> list[int]:
    if filler is not None:
        ids = encode(tokenizer, filler[: needed * 64])[0].tolist()
        if len(ids) >= needed:
            return ids
    made = encode(tokenizer, filler_text())[0].tolist()
    return (made * math.ceil(needed / len(made)))[: needed * 2]


def _answers(stream: Stream, fact: Fact) -> bool:
    """Whether the right answer is the most probable candidate. The stream is used up."""
    model = stream.model
    hidden = stream.advance(torch.tensor([fact.question], device=model.device))
    first = log_probs(model, hidden[0, -1:])[0]
    candidates = [fact.answer, *fact.others]
    scores = [float(first[candidate[0]]) for candidate in candidates]
    width = max(len(candidate) for candidate in candidates)
    if width > 1:
        # Words of several tokens: one batch goes on with all of them; what a row reads beyond its word is not scored.
        batch = stream.fork(len(candidates))
        padded = torch.tensor([[*c[:-1], *[c[0]] * (width - len(c))] for c in candidates], device=model.device)
        hidden = batch.advance(padded)
        for row, candidate in enumerate(candidates):
            if len(candidate) > 1:
                following = log_probs(model, hidden[row, : len(candidate) - 1])
                targets = torch.tensor(candidate[1:], device=following.device)
                scores[row] += float(following.gather(-1, targets[:, None]).sum())
    return scores[0] > max(scores[1:])
