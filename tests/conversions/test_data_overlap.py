"""Overlap between texts is found whatever the line breaks, and named with an example."""

from __future__ import annotations

import pytest

from rnnzoo.conversions.data import TextHashes, refuse_overlap
from rnnzoo.conversions.data import hashes as hashes_module
from rnnzoo.kernels.errors import RnnzooError

from .test_data import prose

PARAGRAPH = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
)


def test_a_shared_paragraph_is_refused_with_an_example():
    ours = TextHashes.of([*prose(50), "Before.\n\n" + PARAGRAPH + "\n\nAfter."], "training")
    theirs = TextHashes.of([PARAGRAPH.upper().replace(",", " ,")], "evaluation")
    with pytest.raises(
        RnnzooError, match="training text and the evaluation text overlap: 1 shared.*It was the best of"
    ):
        refuse_overlap(ours, theirs)
    assert ours.shares(PARAGRAPH)
    assert theirs.overlap(ours).fraction == ours.overlap(theirs).fraction > 0


def test_copied_text_is_found_by_its_words_whatever_its_paragraphs():
    text = prose(1, 500)[0]
    rewrapped = "\n\n".join(text[i : i + 150] for i in range(0, len(text), 150))
    found = TextHashes.of([text]).overlap(TextHashes.of([rewrapped, *prose(3, seed=5)]))
    assert found.fraction > 0.5
    with pytest.raises(RnnzooError, match="of the 13-word runs"):
        refuse_overlap(TextHashes.of([text]), TextHashes.of([rewrapped]))


def test_separate_texts_and_short_common_phrases_pass():
    ours, theirs = prose(100, seed=1), prose(100, seed=2)
    short = "All rights reserved by the author of this text."
    refuse_overlap(TextHashes.of([*ours, short]), TextHashes.of([*theirs, short]))
    refuse_overlap(TextHashes(), TextHashes.of(ours))
    assert not TextHashes.of(ours).shares("\n\n".join(theirs))
    assert not TextHashes().shares(ours[0])


def test_the_hash_of_a_set_of_texts_does_not_depend_on_their_order():
    texts = prose(10)
    assert TextHashes.of(texts).sha256 == TextHashes.of(texts[::-1]).sha256 != TextHashes.of(texts[:9]).sha256


def test_large_sets_are_thinned_alike_and_still_compared(monkeypatch):
    monkeypatch.setattr(hashes_module, "MOST_HASHES", 2_000)
    texts = prose(300, 100)
    large = TextHashes.of(texts)
    assert large.every > 1
    assert len(large.runs) <= 4_000
    small = TextHashes.of(texts[:20], "evaluation")
    assert small.every < large.every
    assert large.overlap(small).fraction > 0.9
    with pytest.raises(RnnzooError, match="overlap"):
        refuse_overlap(large, small)
    assert large.overlap(TextHashes.of(prose(20, 100, seed=7))).fraction == 0
