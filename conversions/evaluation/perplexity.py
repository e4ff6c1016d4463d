"""Perplexity of one long text: by windows, by stride, and by position.

The text is the whole file, joined as it is and tokenised once without special tokens (as usual for WikiText); no window
gets a BOS token, for teacher and student alike. Logits are never held in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...kernels.errors import RnnzooError
from .scoring import Progress, Stream, encode, no_progress, token_log_probs

__all__ = ["POSITION_EDGES", "Perplexity", "PositionBucket", "by_position", "perplexity"]

POSITION_EDGES = (0, 2048, 4096, 8192, 16384, 28672, 32768)


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it came about.

    Attributes:
        value: exp(mean loss per token). stderr: its standard error over windows (delta method); None for one window.
        bits_per_byte: over the UTF-8 bytes of the scored tokens.
    """

    window: int
    stride: int | None
    value: float
    stderr: float | None
    bits_per_byte: float
    n_tokens: int
    n_windows: int


def _windows(length: int, window: int, stride: int | None) -> list[tuple[int, int, int]]:
    """(start, stop, first scored token) of every window over `length` tokens.

    Without stride: windows follow each other, each scored from its second token; an incomplete last window is left out
    unless it is the only one. With stride s: windows start every s tokens and score what no window before them has, so
    that every token but the text's first is scored exactly once, with at least window - s tokens of context (the
    first window apart).
    """
    if stride is None:
        whole = [(start, start + window, start + 1) for start in range(0, length - window + 1, window)]
        return whole or [(0, length, 1)]
    spans, scored = [], 1
    for start in range(0, length, stride):
        stop = min(start + window, length)
        spans.append((start, stop, scored))
        scored = stop
        if stop == length:
            break
    return spans


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 2048,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = no_progress,
) -> Perplexity:
    """Perplexity of `text`.

    Args:
        window: tokens of a window. stride: None for windows side by side, else tokens between window starts, at most
            the window. max_tokens: read no more than the first so many tokens.
    Raises:
        RnnzooError: fewer than two tokens, a window below 2, a stride outside 1..window-1 (at stride = window
            the first token of each window would have no context; leave stride out for that).
    """
    if window < 2 or (stride is not None and not 1 <= stride < window):
        raise RnnzooError(f"window must be at least 2 and stride from 1 to window - 1, not {window} and {stride}.")
    ids, sizes = encode(tokenizer, text[: _characters(max_tokens, text)])
    ids, sizes = ids[:max_tokens], sizes[:max_tokens]
    if len(ids) < 2:
        raise RnnzooError(f"The evaluation text has {len(ids)} tokens: at least 2 are needed.")
    ids = ids.to(model.device)
    spans = _windows(len(ids), window, stride)
    losses: list[float] = []
    counts: list[int] = []
    scored_bytes = 0
    for done, (start, stop, first) in enumerate(spans):
        progress("perplexity", start, spans[-1][1], {"window": done})
        hidden = model.base_model(input_ids=ids[None, start:stop], use_cache=False).last_hidden_state[0]
        scores = token_log_probs(model, hidden[first - 1 - start : -1], ids[first:stop])
        losses.append(-float(scores.double().sum()))
        counts.append(stop - first)
        scored_bytes += int(sizes[first:stop].sum())
    progress("perplexity", spans[-1][1], spans[-1][1], {"window": len(spans)})
    total, tokens = sum(losses), sum(counts)
    value = math.exp(total / tokens)
    bits_per_byte = total / math.log(2) / max(scored_bytes, 1)
    return Perplexity(window, stride, value, _stderr(losses, counts, value), bits_per_byte, tokens, len(spans))


def _characters(max_tokens: int | None, text: str) -> int:
    """Enough text for so many tokens (none stands for over 64 characters of prose): not a whole book for a few."""
    return len(text) if max_tokens is None else max_tokens * 64


def _stderr(losses: list[float], counts: list[int], value: float) -> float | None:
    """Standard error of exp(ratio estimate) over windows as the independent units."""
    windows, tokens = len(losses), sum(counts)
    if windows < 2:
        return None
    mean = sum(losses) / tokens
    residuals = sum((loss - mean * count) ** 2 for loss, count in zip(losses, counts, strict=True))
    return value * math.sqrt(residuals * windows / (windows - 1)) / tokens


@dataclass(frozen=True)
class PositionBucket:
    """Perplexity of the tokens at positions start..end-1 (0-based) of one long text."""

    start: int
    end: int
    perplexity: float
    n_tokens: int


@torch.no_grad()
def by_position(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    max_tokens: int = POSITION_EDGES[-1],
    edges: Sequence[int] = POSITION_EDGES,
    chunk: int = 1024,
    progress: Progress = no_progress,
) -> list[PositionBucket]:
    """One pass over the text's first `max_tokens` tokens with the model's cache, in chunks, so memory is bounded.

    Buckets that the text or `max_tokens` does not fill completely are left out. The text's first token is not scored.
    """
    ids, _ = encode(tokenizer, text[: _characters(max_tokens, text)])
    ids = ids[:max_tokens].to(model.device)
    stream = Stream(model)
    scores: list[Tensor] = [torch.zeros(1)]  # position 0 is not scored
    for start in range(0, len(ids) - 1, chunk):
        stop = min(start + chunk, len(ids) - 1)
        progress("by position", start, len(ids), {})
        hidden = stream.advance(ids[None, start:stop])[0]
        scores.append(token_log_probs(model, hidden, ids[start + 1 : stop + 1]).cpu())
    progress("by position", len(ids), len(ids), {})
    losses = -torch.cat(scores).double()
    buckets = []
    for start, end in zip(edges, edges[1:], strict=False):
        if end > len(losses):
            break
        part = losses[max(start, 1) : end]
        buckets.append(PositionBucket(start, end, math.exp(float(part.mean())), len(part)))
    return buckets
