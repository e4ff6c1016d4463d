"""Conversions by several processes: the same steps as by one, whoever goes on with them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.processes import rows_per_step
from rnnzoo.conversions.stages.training import read_metrics
from rnnzoo.kernels.errors import RnnzooError

from ..end_to_end.conftest import write_documents
from ..stopped import program
from .tiny import tiny_teacher

RECIPE = {
    "student": "hedgehog",
    "student_options": {"feature_map": "prototype", "feature_width": 4, "window_size": 4},
    "seq_len": 64,
    "batch_tokens": 4 * 64,
    "tokens": 40 * 64,
    "calibration_tokens": 512,
    "state_budget": 20_000,
    "stages": [
        {"name": "calibrate", "kind": "calibrate"},
        {"name": "align", "kind": "align", "share": 0.4, "new_lr": 1e-2},
        {"name": "distill", "kind": "train", "share": 0.6, "lr": 1e-3, "new_lr": 1e-2, "kl": 1.0, "ce": 0.5},
    ],
}
SMALL = {"dtype": "float32", "evaluate": False}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[str, str, list[str]]:
    """Teacher, recipe, data."""
    folder = tmp_path_factory.mktemp("given")
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    data = str(write_documents(folder / "text.jsonl", 300))
    return str(tiny_teacher("llama", folder)), str(recipe), [data]


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory) -> Path:
    """The run of one process."""
    teacher, recipe, data = given
    out = tmp_path_factory.mktemp("alone") / "model"
    convert(teacher, recipe, out, data=data, **SMALL)
    return out


def run(
    count: int, given, out: Path, *more: str, program: Sequence[str] = ("-m", "rnnzoo")
) -> subprocess.CompletedProcess[str]:
    teacher, recipe, data = given
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    asked = ["convert", teacher, "--recipe", recipe, "--data", data[0], "--out", str(out), "--dtype", "float32"]
    command = [sys.executable, *start, *program, *asked, "--no-evaluate", "--json", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


def losses(out: Path, stage: str) -> list[float]:
    return [line["loss"] for line in read_metrics(out / ".rnnzoo" / stage)]


def assert_same_end(ours: Path, theirs: Path, stages: Sequence[str] = ("align", "distill")) -> None:
    for stage in stages:
        assert losses(ours, stage) == pytest.approx(losses(theirs, stage), abs=2e-3)
    one, two = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert set(one) == set(two)
    for name, expected in two.items():
        torch.testing.assert_close(one[name], expected, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_end_where_one_does(given, alone, tmp_path):
    out = tmp_path / "model"
    done = run(2, given, out)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)  # printed once
    assert_same_end(out, alone)
    expected = json.loads((alone / "results.json").read_text())
    assert results["conversion"]["tokens"] == expected["conversion"]["tokens"]
    assert results["conversion"]["data"] == expected["conversion"]["data"]
    assert len(losses(out, "align")) == 4 and len(losses(out, "distill")) == 6


def stop_and_go_on(given, out: Path, stage: str, step: int, before: int, after: int, *more: str) -> None:
    """A run by `before` processes is killed after a step of a stage (0: as it begins), and `after` of them end it."""
    point = f"kept:{stage}:{step}" if step else f"said:{stage}"
    done = run(before, given, out, *more, program=program(signal.SIGKILL, point))
    assert done.returncode == -9 or (before > 1 and "SIGKILL" in done.stderr), done.stderr
    assert not (out / "model.safetensors").exists()
    assert bool(list((out / ".rnnzoo" / stage).glob("checkpoint-*/complete"))) == (step > 0)
    done = run(after, given, out, *more)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize(("stage", "step"), [("calibrate", 0), ("align", 2), ("distill", 2)])
def test_a_stopped_run_goes_on_with_another_number_of_processes(given, alone, tmp_path, stage, step, before, after):
    stop_and_go_on(given, tmp_path / "model", stage, step, before, after)
    assert_same_end(tmp_path / "model", alone)


def test_steps_that_cannot_be_divided_are_refused():
    assert rows_per_step(4 * 64, 64, 100, 2) == 4 and rows_per_step(100, 64, 100, 1) == 1
    with pytest.raises(RnnzooError, match="4 sequences of 64 tokens cannot be divided among 3 .*--batch-tokens 384"):
        rows_per_step(4 * 64, 64, 100, 3)


@pytest.mark.slow
def test_a_refusal_is_said_once_and_leaves_nothing(given, tmp_path):
    out = tmp_path / "model"
    done = run(2, given, out, "--batch-tokens", "192")
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == [
        "error: A step of 3 sequences of 64 tokens cannot be divided among 2 processes; choose another number of "
        "processes, or --batch-tokens 256, with text for at least one step."
    ]
    assert not out.exists()
