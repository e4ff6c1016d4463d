"""Stop a conversion anywhere and start it again: the weights are those of an undisturbed run, bit for bit."""

from __future__ import annotations

import hashlib
import shlex
import signal
from pathlib import Path

import pytest

from rnnzoo import cli

from ..stopped import run_stopped


def weights(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_stopped_conversion_says_how_to_go_on_and_ends_at_the_same_weights(workshop, converted, tmp_path):
    out = tmp_path / "student"
    arguments = workshop.convert(out, "--no-evaluate")
    stopped = run_stopped(signal.SIGINT, "kept:distill:2", arguments, workshop.environment)
    assert stopped.returncode == 130, stopped.stderr
    again = f"stopped; the same command goes on from here: rnnzoo {shlex.join(arguments)}"
    assert stopped.stderr.splitlines()[-1] == again
    done = workshop.rnnzoo(*arguments)
    assert "distill: " in done.stderr and "align: " not in done.stderr and "distill: 0 of" not in done.stderr
    assert weights(out) == weights(converted)


@pytest.mark.slow
def test_killed_conversions_end_at_the_same_weights(workshop, converted, tmp_path):
    """One run, killed in every stage, and while it writes: each time the next goes on with what there is."""
    out = tmp_path / "student"
    arguments = workshop.convert(out, "--no-evaluate")
    points = ["placed:training.safetensors", "said:calibrate", "said:align", "kept:align:1", "placed:student-2"]
    points += [
        "said:distill",
        "kept:distill:4",
        "placed:model.safetensors",
        "placed:config.json",
        "placed:results.json",
    ]
    for point in points:
        killed = run_stopped(signal.SIGKILL, point, arguments, workshop.environment)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    workshop.rnnzoo(*arguments)
    assert weights(out) == weights(converted)


def test_finished_conversion_is_not_run_again(workshop, converted):
    before = weights(converted)
    times = {file.name: file.stat().st_mtime_ns for file in converted.glob("*.safetensors")}
    assert cli._run(workshop.convert(converted, "--no-evaluate")) == 0
    assert weights(converted) == before
    assert times == {file.name: file.stat().st_mtime_ns for file in converted.glob("*.safetensors")}


def test_changed_options_are_refused_with_the_difference(workshop, converted, capsys):
    assert cli._run(workshop.convert(converted, "--no-evaluate", "--seed", "7")) == 1
    said = capsys.readouterr().err
    assert "--restart" in said and "seed was 0, is 7" in said and said.count("\n") == 1
