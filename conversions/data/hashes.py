"""Does evaluation text occur in training text? Hashes of paragraphs and of 13-word runs, and a refusal.

Text is compared as lower-case words. Two sets overlap when they share a paragraph of at least 13 words, or more than
1% of the 13-word runs of the smaller one. 13 is the length that GPT-3 and later reports use (Brown et al. 2020,
appendix C).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ...kernels.errors import RnnzooError

__all__ = ["Overlap", "TextHashes", "refuse_overlap"]

RUN = 13
ALLOWED_FRACTION = 0.01
MOST_HASHES = 8_000_000  # beyond it every second, fourth, ... hash value is kept on both sides
EXAMPLE_CHARACTERS = 120
_MULTIPLIERS = np.array([pow(0x9E3779B97F4A7C15, i, 1 << 64) for i in range(RUN)], dtype=np.uint64)


@dataclass(frozen=True)
class Overlap:
    """Shared paragraphs, the shared fraction of the smaller side's 13-word runs, and one shared paragraph."""

    paragraphs: int
    fraction: float
    example: str


class TextHashes:
    """A set of hashes of texts: 8 bytes for each 13-word run, and the beginning of each paragraph for messages.

    Args:
        name: what the text is for, in messages: "training".
    """

    def __init__(self, name: str = "text"):
        self.name = name
        self.paragraphs: dict[int, str] = {}
        self.every = 1
        self._runs = np.empty(0, dtype=np.uint64)
        self._new: list[np.ndarray] = []
        self._new_size = 0

    @classmethod
    def of(cls, texts: Iterable[str], name: str = "text") -> TextHashes:
        hashes = cls(name)
        for text in texts:
            hashes.add(text)
        return hashes

    def add(self, text: str) -> None:
        paragraphs, runs = _hashed(text)
        self.paragraphs.update((h, p) for h, p in paragraphs.items() if h % self.every == 0)
        runs = runs[runs % self.every == 0]
        self._new.append(runs)
        self._new_size += len(runs)
        if self._new_size > MOST_HASHES // 2:
            self._thin()

    @property
    def runs(self) -> np.ndarray:
        """The hashes of all 13-word runs, sorted, each once: uint64."""
        if self._new:
            self._runs = np.unique(np.concatenate([self._runs, *self._new]))
            self._new, self._new_size = [], 0
        return self._runs

    @runs.setter
    def runs(self, values: np.ndarray) -> None:
        self._runs, self._new, self._new_size = np.unique(values), [], 0

    def _thin(self) -> None:
        while len(self.runs) > MOST_HASHES:
            self.every *= 2
            self._runs = self._runs[self._runs % self.every == 0]
            self.paragraphs = {h: p for h, p in self.paragraphs.items() if h % self.every == 0}

    def overlap(self, other: TextHashes) -> Overlap:
        """What the two share. Symmetric."""
        every = max(self.every, other.every)
        mine, theirs = (runs[runs % every == 0] for runs in (self.runs, other.runs))
        shared = np.intersect1d(mine, theirs, assume_unique=True)
        paragraphs = [h for h in self.paragraphs.keys() & other.paragraphs.keys() if h % every == 0]
        example = min((self.paragraphs[h] for h in paragraphs), default="")
        return Overlap(len(paragraphs), len(shared) / max(1, min(len(mine), len(theirs))), example)

    def shares(self, text: str) -> bool:
        """Whether adding this text to another set would make that set overlap with this one."""
        paragraphs, runs = _hashed(text)
        if paragraphs.keys() & self.paragraphs.keys():
            return True
        if not len(runs) or not len(self.runs):
            return False
        places = np.searchsorted(self.runs, runs).clip(max=len(self.runs) - 1)  # np.isin would sort all again
        return float((self.runs[places] == runs).mean()) > ALLOWED_FRACTION

    @property
    def sha256(self) -> str:
        """Identifies the set of texts, in any order."""
        return hashlib.sha256(self.runs.tobytes() + repr(sorted(self.paragraphs)).encode()).hexdigest()


def refuse_overlap(a: TextHashes, b: TextHashes) -> None:
    """Raises RnnzooError where two texts share a paragraph of 13 words, or over 1% of their 13-word runs."""
    found = a.overlap(b)
    if not found.paragraphs and found.fraction <= ALLOWED_FRACTION:
        return
    example = f', for one "{found.example}"' if found.example else ""
    raise RnnzooError(
        f"The {a.name} text and the {b.name} text overlap: {found.paragraphs} shared paragraphs and "
        f"{found.fraction:.1%} of the {RUN}-word runs{example}; figures measured so would be too good. "
        "Use text that is not in both."
    )


def _hashed(text: str) -> tuple[dict[int, str], np.ndarray]:
    """Hash -> beginning of each paragraph of 13 words or more; hashes of all runs of 13 words of the text."""
    paragraphs = {}
    all_words: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.findall(r"\w+", paragraph.lower())
        all_words += words
        if len(words) >= RUN:
            key = int.from_bytes(_digest(" ".join(words)), "little") >> 1  # fits a signed 64-bit file format
            paragraphs[key] = " ".join(paragraph.split())[:EXAMPLE_CHARACTERS]
    if len(all_words) < RUN:
        return paragraphs, np.empty(0, dtype=np.uint64)
    numbers = {word: int.from_bytes(_digest(word), "little") for word in set(all_words)}
    values = np.array([numbers[word] for word in all_words], dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(values, RUN)
    runs = np.zeros(len(windows), dtype=np.uint64)
    for i in range(RUN):
        runs += windows[:, i] * _MULTIPLIERS[i]
    runs ^= runs >> np.uint64(31)  # the low bits choose what is kept when sets are thinned
    return paragraphs, runs


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
