"""The tables of the benchmark scripts: what is promised, what was measured, and how far rounds lie apart."""

from __future__ import annotations

import json

import pytest

from rnnzoo.benchmarks.figures import Figure, median_of_rounds, report


def test_a_figure_is_met_on_the_right_side_of_its_target():
    assert Figure("a", "b", 2.0, " x", 2).met and not Figure("a", "b", 1.9, " x", 2).met
    assert Figure("a", "b", 18.0, " x", 18, at_most=True).met and not Figure("a", "b", 18.1, " x", 18, at_most=True).met
    assert Figure("a", "b", 0.0, " s").met


def test_rounds_give_their_median_and_how_far_they_lie_apart():
    rounds = [[Figure("a", "b", value, " x", 2), Figure("c", "", 10 * value, " s")] for value in (3.0, 1.0, 2.5)]
    first, second = median_of_rounds(rounds)
    assert (first.value, first.least, first.most, first.met) == (2.5, 1.0, 3.0, True)
    assert first.line() == "| a | b | 2.5 x (1 to 3) | at least 2 x | yes |"
    assert second.line() == "| c |  | 25 s (10 to 30) |  |  |"
    assert median_of_rounds(rounds[:1]) == rounds[0]
    with pytest.raises(ValueError):
        median_of_rounds([rounds[0], rounds[1][:1]])


def test_a_report_is_a_table_and_the_same_as_json(tmp_path):
    text = report([Figure("a", "b", 1.0, " x", 2)], "Two threads.", tmp_path, machine={"threads": 2})
    assert text.startswith("Two threads.\n\n| what |") and (tmp_path / "figures.md").read_text() == text
    values = json.loads((tmp_path / "figures.json").read_text())
    assert values["machine"] == {"threads": 2} and values["figures"][0]["met"] is False
