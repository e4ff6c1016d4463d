"""What `plan`, `convert` and `eval` draw on the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from rnnzoo.cli.plan_command import _show as show_plan
from rnnzoo.cli.results import show_results


def drawn(show) -> str:
    console = Console(file=io.StringIO(), width=120)
    show(console)
    return console.file.getvalue()


def test_plan_shows_figures_with_units_and_every_layer():
    plan = {
        "teacher": {"name": "a/b", "parameters": 134_515_008, "licence": None},
        "state_bytes": 4_000_000,
        "seconds": 1500.0,
        "layers": [{"layer": 0, "mixer": "hedgehog", "windows": [64, 128]}, {"layer": 1, "mixer": "full_attention"}],
    }
    text = drawn(lambda console: show_plan(plan, console))
    for words in ("teacher parameters", "135M", "4 MB", "25 min 0 s", "64, 128", "full_attention"):
        assert words in text, text


def test_results_stand_side_by_side_and_leave_out_what_was_not_measured():
    measured = {"dataset": "held out", "window": 2048, "stride": 2048, "stderr": 0.25, "n_tokens": 9}
    results = {
        "model": {"model_type": "rnnzoo-hedgehog", "parameters": 1000, "state_bytes": 2000},
        "evaluation": {
            "perplexity": [
                {**measured, "column": "student", "value": 27.5},
                {**measured, "column": "teacher", "value": 22.9, "stderr": None},
                {**measured, "column": "window", "value": None},
            ],
        },
    }
    text = drawn(lambda console: show_results(results, "out [1]", console))
    assert "27.5 ± 0.25" in text and "22.9" in text and "window " not in text.splitlines()[1]
    assert "recall" not in text and text.endswith("out [1]\n")
    assert drawn(lambda console: show_results({}, "out", console)) == "out\n"
