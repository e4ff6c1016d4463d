"""scripts/bench_kernels.py: what can be chosen, what wrong choices are told, which bytes count."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from click.testing import CliRunner

from rnnzoo.benchmarks.cases import CASES
from rnnzoo.benchmarks.timing import Machine, seconds

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_kernels.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_kernels", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "fast_conv"], "no recurrence has 'fast_conv' in its name; there are: linear_scan;"),
        (["--part", "speed"], "'speed' is not one of 'peers', 'copy', 'steps', 'lengths', 'memory', 'first-use'"),
        (["--seconds", "0"], "0.0 is not in the range x>0"),
        (["--rounds", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_choices_are_told_before_anything_is_measured(script, arguments, words):
    done = CliRunner().invoke(script.main, arguments)
    assert done.exit_code == 2 and words in done.output


def test_parts_and_names_choose_what_is_measured(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "measure_machine", lambda: Machine("cpu", 1, 1e10, 1e11, 1e11))
    arguments = ["--part", "steps", "--only", "conv", "--only", "softmax", "--seconds", "0.001", "--out", str(tmp_path)]
    done = CliRunner().invoke(script.main, arguments)
    assert done.exit_code == 0, done.output
    rows = [line for line in (tmp_path / "figures.md").read_text().splitlines() if "one step" in line]
    assert [row.split(",")[0] for row in rows] == ["| softmax_scan", "| short_conv"]


@pytest.mark.parametrize(
    ("name", "forward", "both"), [("linear_scan", 3, 8), ("softmax_scan, RWKV-4", 3, 8), ("short_conv, silu", 2, 5)]
)
def test_bytes_are_inputs_and_output_twice_and_gradients_once(name, forward, both):
    case = next(case for case in (make() for make in CASES) if case.name == name)
    tensor = 65_536 * 1024 * 4
    assert round(case.moved(65_536, False) / tensor, 2) == forward
    assert round(case.moved(65_536, True) / tensor, 2) == both


def test_calls_that_find_memory_are_not_counted():
    calls = []
    seconds(lambda: calls.append(None), budget=1e9, warm=4)
    assert len(calls) == 4 + 200  # no more than 200 are
