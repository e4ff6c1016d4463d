"""Limits in plain words follow from the numbers."""

from __future__ import annotations

import pytest

from rnnzoo.cards.render import render_text

from .invented import invented, section


def limits(results) -> str:
    return section(render_text(results), "Limits")


def test_limits_follow_from_the_numbers():
    text = limits(invented())
    assert "1.25 times that of its teacher" in text
    assert "better than the teacher cut to a window" in text and "not better" not in text
    assert "from 64 and 1,024 tokens back" in text and "From 8,192 tokens back" in text
    assert "1.50 MB at any length" in text and "6.0 points on pairs" in text
    assert "another most likely token in 3.1 % of 64 places" in text
    worse = invented()
    worse["evaluation"]["perplexity"][2]["value"] = 11.0
    assert "not better than the teacher cut" in limits(worse)


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ((1.0, 0.6, 0.1), "falls below 50 % beyond 1,024 tokens: 60 % there, 10 % at 8,192 (n = 16 at each distance)."),
        ((1.0, 0.9, 0.5), "stays at 50 % or more up to 8,192 tokens, the longest measured (n = 16 at each distance)."),
        ((0.4, 0.3, 0.1), "is below 50 % already 64 tokens back: 40 % (n = 16 at each distance)."),
        ((1.0, 0.2, 0.6), "falls below 50 % beyond 64 tokens: 100 % there, 20 % at 1,024 (n = 16 at each distance). It "
                          "rises above that again further back."),
    ],
)  # fmt: skip
def test_recall_below_half_is_said_with_its_distance(accuracies, words):
    results = invented()
    rows = [row for row in results["evaluation"]["recall"] if row["column"] == "student"]
    for row, accuracy in zip(rows, accuracies, strict=True):
        row["accuracy"] = accuracy
    assert f"Its recall {words}" in limits(results)


def test_contexts_where_the_teacher_decodes_faster_are_named():
    results = invented()
    assert "slower" not in limits(results)  # 9 tokens/s against 8.8 and less
    results["evaluation"]["decode"][0]["tokens_per_second"] = 5
    assert "slower than its teacher at a context of 1,024 tokens" in limits(results)
