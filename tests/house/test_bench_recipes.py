"""scripts/bench_recipes.py: the grid is fair, rows are the results' own numbers, kills are told apart."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from rnnzoo.benchmarks import kills
from rnnzoo.benchmarks.frontier import draw, frontier_rows, frontier_table
from rnnzoo.benchmarks.kills import kill_and_compare, tiny_setting
from rnnzoo.benchmarks.recipes import bounded_cache, figures_of, grid, measure, recipe_table
from rnnzoo.conversions.recipes import list_recipes
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError

ROW = {"run": "supra", "keep": "none", "tokens": 10, "state_bytes": 2_000_000, "bytes_per_token": 0, "minutes": 1.5}
ROW |= {"ppl_2048_student": 30.0, "recall_64_student": 0.5}
OURS = ROW | {"run": "rnnzoo-4MB", "ppl_2048_window": 40.0, "ppl_2048_teacher": 20.0, "bytes_per_token": 100}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return tiny_setting(tmp_path_factory.mktemp("kills"))


def test_every_recipe_has_every_number_of_tokens_and_ours_two_budgets():
    runs = grid((), (0, 50), ("none", "1/4"), "gla")
    assert len(runs) == 4 * (len(list_recipes()) + 2) and len({run.name for run in runs}) == len(runs)
    assert [run.options["tokens"] for run in runs] == sorted(run.options["tokens"] for run in runs)
    ours = {run.label: run.options for run in runs if run.recipe == "rnnzoo"}
    assert set(ours) == {"rnnzoo", "rnnzoo-1.5MB", "rnnzoo --student gla"}
    assert {run.label for run in grid(("supra",), (0,), ("none",), "gla")} == {"supra"}


def test_a_row_is_what_was_measured(setting, tmp_path):
    settings = {"teacher": str(setting.teacher), "data": [str(setting.text)], "files": [str(setting.text)]}
    (run,) = grid(("supra",), (0,), ("none",), None)
    row = measure(run, tmp_path / "supra", **settings, columns=("student", "teacher"), windows=(128,), eval_tokens=256)
    assert row["run"] == "supra" and row["trained_tokens"] == 0 and row["state_bytes"] == 4 * 6 * 8 * 8 * 4
    assert row["ppl_128_student"] > 1 and row["ppl_128_teacher"] > 1
    assert {"recall_64_student", "recall_64_teacher"} <= set(row)


def test_a_bounded_cache_has_the_bytes_that_were_asked_for(setting, tmp_path):
    teacher = resolve_teacher(str(setting.teacher))
    run = bounded_cache(teacher, 100_000, tmp_path)
    # 4 layers of 2 heads, keys and values of 8 in bfloat16
    assert yaml.safe_load(Path(run.recipe).read_text())["student_options"] == {
        "tova_states": 100_000 // (4 * 2 * 2 * 8 * 2)
    }


def test_figures_leave_out_strided_windows_and_other_metrics():
    results = {
        "model": {"state_bytes": 5, "state_bytes_per_token": 1},
        "conversion": {"tokens": 7},
        "evaluation": {
            "perplexity": [
                {"window": 64, "stride": None, "column": "student", "value": 3.0},
                {"window": 64, "stride": 32, "column": "student", "value": 2.0},
            ],
            "tasks": [
                {"task": "t", "metric": "accuracy", "column": "student", "value": 0.5},
                {"task": "t", "metric": "perplexity", "column": "student", "value": 9.0},
            ],
            "recall": [{"distance": 64, "column": "window", "accuracy": 0.25}],
        },
    }
    expected = {"state_bytes": 5, "bytes_per_token": 1, "trained_tokens": 7}
    assert figures_of(results) == expected | {"ppl_64_student": 3.0, "t_student": 0.5, "recall_64_window": 0.25}


def test_the_table_compares_with_the_teacher():
    text = recipe_table([ROW, OURS], ["LAMBADA"])
    assert "| supra | none | 10 | 2.00 | 30.00 | 1.5 | - | 0.50 | - | - | 1.5 |" in text
    assert "2.00 and caches" in text and text.splitlines()[-1].startswith("| teacher | all | - | cache | 20.00 | 1.00")


def test_the_frontier_counts_the_bytes_of_kept_attention_and_has_the_window(tmp_path):
    rows = frontier_rows([ROW, OURS])
    assert [(row["series"], row["bytes"], row["ppl_2048"]) for row in rows] == [
        ("rnnzoo", 2_819_200, 30.0),
        ("supra", 2_000_000, 30.0),
        ("window + sinks", 2_819_200, 40.0),
    ]
    assert "| window + sinks | 2.82 | 40.00 | - | - | - |" in frontier_table(rows, {"ppl_2048": 20.0})
    pytest.importorskip("matplotlib")
    draw(rows, {"ppl_2048": 20.0}, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


class Moment:
    """Stands in for the draw of the moment of a kill: as soon as the process runs, or long after it has ended."""

    def __init__(self, late: bool):
        self.late = late

    def uniform(self, low: float, high: float) -> float:
        return 1e6 if self.late else 0.0


def test_other_weights_after_a_kill_are_told(setting, tmp_path, monkeypatch):
    """With a command that writes a word as weights, one that is another each time, and one that fails."""
    write = "import os, sys, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(parents=True, exist_ok=True);"
    write += "(p / 'model.safetensors').write_text(sys.argv[2] or os.urandom(8).hex())"
    begun = set()

    def command(words: str, late: bool):
        def of(setting, recipe, out):
            meets = not late and "killed" in out.name and out not in begun  # the run that is to be killed does not end
            begun.add(out)
            return [kills.sys.executable, "-c", "import signal; signal.pause()" if meets else write, str(out), words]

        return of

    def outcomes(name: str, moment: Moment, words: str) -> list[tuple[bool, str]]:
        monkeypatch.setattr(kills, "_command", command(words, moment.late))
        return [(o.same, o.words) for o in kill_and_compare(setting, "x", 1, tmp_path / name, moment)]

    assert outcomes("a", Moment(late=True), "same") == [(True, "it had ended before: the same weights")]
    assert outcomes("b", Moment(late=False), "same") == [(True, "killed and run again: the same weights")]
    assert outcomes("c", Moment(late=True), "") == [(False, "it had ended before: OTHER WEIGHTS")]
    monkeypatch.setattr(kills, "_command", lambda *_: [kills.sys.executable, "-c", "raise SystemExit('no text')"])
    with pytest.raises(RnnzooError, match="fails without any kill: no text"):
        next(kill_and_compare(setting, "x", 1, tmp_path / "d", random.Random(0)))


@pytest.mark.slow
def test_a_killed_conversion_ends_at_the_same_weights(setting, tmp_path):
    (outcome,) = kill_and_compare(setting, "rnnzoo", 1, tmp_path / "runs", random.Random(1))
    assert outcome.same, outcome.words
