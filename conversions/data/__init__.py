"""Text for conversions: from `--data` to packed sequences, and hashes that keep evaluation text apart."""

from __future__ import annotations

from .corpus import Corpus, Split, corpus_from_texts, mixed_corpus, open_corpus, split_of
from .default import HUB_DATASET, default_corpus
from .hashes import Overlap, TextHashes, refuse_overlap
from .installed import python_prose
from .packing import PackedTokens, check_sequence_length, pack

__all__ = [
    "HUB_DATASET",
    "Corpus",
    "Overlap",
    "PackedTokens",
    "Split",
    "TextHashes",
    "check_sequence_length",
    "corpus_from_texts",
    "default_corpus",
    "mixed_corpus",
    "open_corpus",
    "pack",
    "python_prose",
    "refuse_overlap",
    "split_of",
]
