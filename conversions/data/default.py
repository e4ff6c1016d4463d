"""What a conversion reads when nobody says `--data`.

With the Hub: FineWeb-Edu (Penedo et al. 2024; ODC-By), the open web text that SmolLM2 itself was trained on, streamed.
Without: prose of the Python installation, and conversations sampled from the teacher. Which of the two a run has begun
with is kept in its folder, so that it goes on with the same, whether or not the Hub answers then.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...kernels.errors import RnnzooError
from ...kernels.files import replace_text
from ..teachers.files import hub_reachable
from .corpus import Corpus, corpus_from_texts, mixed_corpus, open_corpus
from .installed import PROSE_SOURCE, python_prose

__all__ = ["HUB_DATASET", "default_corpus"]

log = logging.getLogger(__name__)
HUB_DATASET = "HuggingFaceFW/fineweb-edu:sample-10BT"
BUILT_IN = "built-in"


def default_corpus(
    tokenizer: Any,
    *,
    model: Any = None,
    sampled_tokens: int = 0,
    sampled_length: int = 1024,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    record: Path | None = None,
) -> Corpus:
    """The Hub's corpus if it answers within seconds, else what this machine has.

    Args:
        model: the teacher to sample `sampled_tokens` tokens from when the Hub is not there, in documents of
            `sampled_length` tokens; None or 0: prose only.
        seed: of the samples. progress: of the sampling, called with (tokens so far, tokens in all).
        record: file that keeps the choice; where it is there already, that choice holds.
    Raises:
        RnnzooError: the choice was the Hub's corpus, which is not available now.
    """
    before = json.loads(record.read_text(encoding="utf-8"))["text"] if record and record.exists() else None
    corpus = _hub_corpus(tokenizer, before) if before != BUILT_IN else None
    if record and before is None:
        replace_text(record, json.dumps({"text": HUB_DATASET if corpus else BUILT_IN}) + "\n")
    if corpus:
        return corpus
    prose = corpus_from_texts(python_prose(), PROSE_SOURCE)
    if model is None or not sampled_tokens:
        return prose
    from .sampling import sample_from_teacher  # brings in generation, which planning does without

    texts = sample_from_teacher(
        model, tokenizer, sampled_tokens, seed=seed, max_new_tokens=sampled_length, progress=progress
    )
    samples = corpus_from_texts(texts, f"{sampled_tokens} tokens sampled from the teacher (seed {seed})")
    return mixed_corpus([(samples, sum(map(len, texts))), (prose, sum(map(len, python_prose())))])


def _hub_corpus(tokenizer: Any, needed: str | None) -> Corpus | None:
    """The Hub's corpus; None where it is not available and not `needed`."""
    reason, reachable = "the Hub is not reachable", hub_reachable()
    if reachable:
        try:
            corpus = open_corpus(HUB_DATASET, tokenizer=tokenizer)
            next(corpus.read(0))  # the first bytes, or a reason to go on without
            return corpus
        except (RnnzooError, OSError, StopIteration) as error:
            reason = f"{HUB_DATASET} is not available ({error})"
    if needed:
        raise RnnzooError(
            f"This run was begun with text of the Hub ({needed}), and {reason}: run the same command again when it is, "
            "or begin anew with --restart."
        )
    log.log(logging.WARNING if reachable else logging.INFO, "%s; using built-in text", reason)
    return None
