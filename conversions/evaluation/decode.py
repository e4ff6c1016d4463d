"""State bytes and decoding speed by tokens of context, batch 1, one token at a time through the model's own cache.

A step is what greedy decoding does: base model on one token, head, argmax. The median step is reported.

How the context comes about: a student reads it, in chunks (its state then is what it would be in use). A teacher's
key-value cache is filled with random keys and values of the right shape and dtype instead: the cost of a step does not
depend on the values, and reading 32k tokens would take minutes. The result says which (`context_kind`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from ...zoo.core.decoding import replaying
from .environment import device_name
from .scoring import Progress, Stream, no_progress

__all__ = ["DecodePoint", "decode"]


@dataclass(frozen=True)
class DecodePoint:
    """`state_bytes` are the cache's at `context` tokens; `tokens_per_second` is 1 / the median step."""

    context: int
    tokens_per_second: float
    state_bytes: int
    steps: int
    context_kind: str  # "read" or "random keys and values"
    device: str
    dtype: str


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    *,
    contexts: Sequence[int] = (1024, 4096, 16384, 32768),
    steps: int = 24,
    warmup: int = 4,
    chunk: int = 1024,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[DecodePoint]:
    """Measures a decoding step at each context length (ascending).

    A student reads each context on from the one before, so the whole costs one reading of the longest.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    probe = Stream(model)
    probe.advance(_random_ids(vocabulary, 1, generator, model.device))
    transformer = type(probe.cache) is DynamicCache
    stream = Stream(model)
    points = []
    for context in sorted(contexts):
        progress("decode", 0 if transformer else stream.seen, max(contexts), {"context": context})
        if transformer:
            stream = _random_context(model, context, generator)
        else:
            while stream.seen < context:
                count = min(chunk, context - stream.seen)
                stream.advance(_random_ids(vocabulary, count, generator, model.device))
        state_bytes = stream.state_bytes()
        with replaying(model):  # as in generate()
            seconds = _time_steps(stream.fork(), steps, warmup)
        kind = "random keys and values" if transformer else "read"
        where = device_name(model.device), str(model.dtype).removeprefix("torch.")
        points.append(DecodePoint(context, 1 / statistics.median(seconds), state_bytes, steps, kind, *where))
    progress("decode", max(contexts), max(contexts), {})
    return points


def _random_ids(vocabulary: int, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    return torch.randint(vocabulary, (1, count), generator=generator).to(device)


def _random_context(model: PreTrainedModel, context: int, generator: torch.Generator) -> Stream:
    """A stream that stands at `context` tokens with random keys and values; shapes are learnt from one real token."""
    stream = Stream(model)
    stream.advance(_random_ids(model.config.vocab_size, 1, generator, model.device))
    limit = stream.window.sinks + stream.window.window - 1 if stream.window else context
    for layer in stream.cache.layers:
        length = min(context, limit)
        if getattr(layer, "is_sliding", False):
            length = min(length, layer.sliding_window - 1)
            layer.cumulative_length = context
        for name in ("keys", "values"):
            one = getattr(layer, name)
            shape = (*one.shape[:2], length, one.shape[3])
            setattr(layer, name, torch.randn(shape, generator=generator).to(one))
    stream.seen = context
    return stream


def _time_steps(stream: Stream, steps: int, warmup: int) -> list[float]:
    model = stream.model
    head = model.get_output_embeddings()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    seconds = []
    for step in range(warmup + steps):
        started = time.perf_counter()
        token = head(stream.advance(token)[:, -1]).argmax(-1, keepdim=True)
        token.item()  # waits for the device
        if step >= warmup:
            seconds.append(time.perf_counter() - started)
    return seconds
