"""Tasks that need no framework: the last word of a passage (LAMBADA) and minimal pairs (BLiMP).

A text that is scored from its first token is preceded by BOS (else EOS), for every model alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...kernels.errors import RnnzooError
from .scoring import Progress, log_probs, no_progress, prefix_token

__all__ = ["TaskResult", "last_word", "minimal_pairs", "score_continuations"]

_BATCH_TOKENS = 2048  # padded tokens of one batch


@dataclass(frozen=True)
class TaskResult:
    """`stderr` is the binomial standard error of the accuracy; `perplexity` is of the target words (last word only)."""

    metric: str
    value: float
    stderr: float
    n: int
    chance: float | None = None
    perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def binomial_stderr(accuracy: float, n: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / n)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices sorted by length, in batches of at most _BATCH_TOKENS tokens after padding (at least one each)."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[index] > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


@torch.no_grad()
def score_continuations(
    model: PreTrainedModel,
    sequences: Sequence[tuple[list[int], list[int]]],
    *,
    pad_id: int = 0,
    progress: Progress = no_progress,
    what: str = "tasks",
) -> list[tuple[float, bool]]:
    """Log probability of each continuation after its (non-empty) context, and whether greedy decoding would give it.

    Sequences are padded on the right, with a mask.
    """
    results: list[tuple[float, bool]] = [(0.0, False)] * len(sequences)
    lengths = [len(context) + len(continuation) - 1 for context, continuation in sequences]
    done = 0
    for batch in _batches(lengths):
        width = max(lengths[i] for i in batch)
        ids = torch.full((len(batch), width), pad_id, dtype=torch.long)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, i in enumerate(batch):
            context, continuation = sequences[i]
            ids[row, : lengths[i]] = torch.tensor((context + continuation)[:-1])
            mask[row, : lengths[i]] = 1
        hidden = model.base_model(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        ).last_hidden_state
        for row, i in enumerate(batch):
            context, continuation = sequences[i]
            scores = log_probs(model, hidden[row, len(context) - 1 : lengths[i]])
            targets = torch.tensor(continuation, device=scores.device)
            total = float(scores.gather(-1, targets[:, None]).double().sum())
            results[i] = (total, bool((scores.argmax(-1) == targets).all()))
        done += len(batch)
        progress(what, done, len(sequences), {})
    return results


def last_word(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
    *,
    max_items: int | None = None,
    progress: Progress = no_progress,
) -> TaskResult:
    """Greedy exact match of all tokens of the last word, given the passage before it.

    Args:
        items: dicts with `context` and `target` (a space is put between them unless there is one).
    """
    sequences = []
    for item in _chosen(items, max_items):
        context, target = item["context"].rstrip(), " " + item["target"].strip()
        # Tokenised together, because a tokeniser may split the joint differently.
        before = tokenizer(context, add_special_tokens=False)["input_ids"]
        whole = tokenizer(context + target, add_special_tokens=False)["input_ids"]
        sequences.append(([prefix_token(tokenizer), *whole[: len(before)]], whole[len(before) :]))
    scores = score_continuations(model, sequences, progress=progress, what="last word")
    n = len(scores)
    accuracy = sum(greedy for _, greedy in scores) / n
    perplexity = math.exp(-sum(score for score, _ in scores) / n)
    return TaskResult("accuracy", accuracy, binomial_stderr(accuracy, n), n, perplexity=perplexity)


def minimal_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
    *,
    max_items: int | None = None,
    progress: Progress = no_progress,
) -> TaskResult:
    """How often the good sentence has the higher summed log probability. Chance is one half; a tie counts as wrong."""
    chosen = _chosen(items, max_items)
    start = [prefix_token(tokenizer)]
    sequences = [
        (start, tokenizer(item[field], add_special_tokens=False)["input_ids"])
        for item in chosen
        for field in ("sentence_good", "sentence_bad")
    ]
    scores = [score for score, _ in score_continuations(model, sequences, progress=progress, what="minimal pairs")]
    accuracy = sum(good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)) / len(chosen)
    return TaskResult("accuracy", accuracy, binomial_stderr(accuracy, len(chosen)), len(chosen), chance=0.5)


def _chosen(items: Sequence[dict[str, Any]], max_items: int | None) -> Sequence[dict[str, Any]]:
    """All items, or `max_items` of them evenly spaced, so that files sorted by phenomenon are covered throughout."""
    if not items:
        raise RnnzooError("The task holds no items: give a file with at least one.")
    if max_items is None or max_items >= len(items):
        return items
    return [items[i * len(items) // max_items] for i in range(max_items)]
