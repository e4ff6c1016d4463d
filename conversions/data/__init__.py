"""Text for conversions: from `--data` to packed sequences, with hashes that keep evaluation text apart from the rest."""

from __future__ import annotations

from .corpus import Corpus, Split, corpus_from_texts, documents, open_corpus, split_of
from .hashes import Overlap, TextHashes, refuse_overlap
from .packing import PackedTokens, check_sequence_length, pack

__all__ = [
    "Corpus",
    "Overlap",
    "PackedTokens",
    "Split",
    "TextHashes",
    "check_sequence_length",
    "corpus_from_texts",
    "documents",
    "open_corpus",
    "pack",
    "refuse_overlap",
    "split_of",
]
