"""What a conversion reads when nobody says `--data`.

With the Hub: FineWeb-Edu (Penedo et al. 2024; ODC-By), the open web text that SmolLM2 itself was trained on, streamed.
Without: prose of the Python installation, and conversations sampled from the teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ...kernels.errors import RnnzooError
from ..teachers.files import hub_reachable
from .corpus import Corpus, corpus_from_texts, mixed_corpus, open_corpus
from .installed import PROSE_SOURCE, python_prose

__all__ = ["HUB_DATASET", "default_corpus"]

log = logging.getLogger(__name__)
HUB_DATASET = "HuggingFaceFW/fineweb-edu:sample-10BT"


def default_corpus(
    tokenizer: Any,
    *,
    model: Any = None,
    sampled_tokens: int = 0,
    sampled_length: int = 1024,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """The Hub's corpus if it answers within seconds, else what this machine has.

    Args:
        model: the teacher to sample `sampled_tokens` tokens from when the Hub is not there, in documents of
            `sampled_length` tokens; None or 0: prose only.
        seed: of the samples. progress: of the sampling, called with (tokens so far, tokens in all).
    """
    if hub_reachable():
        try:
            corpus = open_corpus(HUB_DATASET, tokenizer=tokenizer)
            next(corpus.read(0))  # the first bytes, or a reason to go on without
            return corpus
        except (RnnzooError, OSError, StopIteration) as error:
            log.warning("%s is not available (%s); using built-in text", HUB_DATASET, error)
    else:
        log.info("the Hub is not reachable; using built-in text")
    prose = corpus_from_texts(python_prose(), PROSE_SOURCE)
    if model is None or not sampled_tokens:
        return prose
    from .sampling import sample_from_teacher  # brings in generation, which planning does without

    texts = sample_from_teacher(
        model, tokenizer, sampled_tokens, seed=seed, max_new_tokens=sampled_length, progress=progress
    )
    samples = corpus_from_texts(texts, f"{sampled_tokens} tokens sampled from the teacher (seed {seed})")
    return mixed_corpus([(samples, sum(map(len, texts))), (prose, sum(map(len, python_prose())))])
