"""How much is measured: sizes of an evaluation, small to whole."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.errors import RnnzooError
from .recall import DISTANCES

__all__ = ["LIMITS", "Limits", "limits_of"]


@dataclass(frozen=True)
class Limits:
    """None means all of it. Lengths are tokens.

    Attributes:
        windows: window lengths of perplexity, side by side. strided: (window, stride) pairs besides.
        perplexity_tokens: of each text. task_items: of each task, evenly spaced over the file.
        position_tokens: length of the pass by position. teacher_position_tokens: of the teacher's own pass, whose cost
            grows with the square (None: twice its trained length).
        distances, facts, streams: of recall; n = facts x streams at each distance.
        recall_contexts, context_distances: recall at these distances of facts that come so late in a text.
        ablation_tokens: perplexity of each branch alone (window, linear state), where layers have several; 0: no.
        contexts, decode_steps: of decoding.
        parity_context, parity_steps: tokens read at once, and then one by one; 0 steps: not compared.
        sample_tokens: new tokens of each sample output, and of the card's example; 0: neither.
    """

    windows: tuple[int, ...] = (2048,)
    strided: tuple[tuple[int, int], ...] = ()
    perplexity_tokens: int | None = 65_536
    task_items: int | None = 300
    position_tokens: int = 32_768
    teacher_position_tokens: int | None = None
    distances: tuple[int, ...] = DISTANCES
    facts: int = 8
    streams: int = 2
    recall_contexts: tuple[int, ...] = (2048, 8192)
    context_distances: tuple[int, ...] = (64, 512)
    ablation_tokens: int = 8192
    contexts: tuple[int, ...] = (1024, 4096, 16_384, 32_768)
    decode_steps: int = 24
    parity_context: int = 448
    parity_steps: int = 64
    sample_tokens: int = 64
    chunk: int = 1024


LIMITS = {
    "quick": Limits(
        perplexity_tokens=8192,
        task_items=100,
        position_tokens=8192,
        distances=(16, 64, 256, 1024, 2048),
        streams=1,
        recall_contexts=(2048,),
        ablation_tokens=4096,
        contexts=(1024, 8192),
        decode_steps=16,
        sample_tokens=48,
    ),
    "standard": Limits(),
    "full": Limits(
        windows=(2048, 8192),
        strided=((2048, 512),),
        perplexity_tokens=None,
        task_items=None,
        streams=6,
        recall_contexts=(2048, 8192, 16_384),
        sample_tokens=96,
    ),
}


def limits_of(value: str | Limits) -> Limits:
    """A named size or one's own."""
    if isinstance(value, Limits):
        return value
    if value not in LIMITS:
        raise RnnzooError(f"Unknown evaluation size {value!r}: expected {', '.join(LIMITS)}.")
    return LIMITS[value]
