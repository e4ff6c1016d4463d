"""Kill a conversion at any moment and start it again: the weights are those of an undisturbed run, bit for bit."""

from __future__ import annotations

import hashlib
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rnnzoo import cli


def weights(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_until_killed(command: list[str], environment: dict[str, str], stage_lines: int, seconds: float) -> int:
    """Kills the process `seconds` after its `stage_lines`-th line of progress; returns its exit code."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for _ in range(stage_lines):
            if not process.stderr.readline():
                break
        time.sleep(seconds)
        process.kill()
        process.stderr.read()
    return process.returncode


def test_stopped_conversion_says_how_to_go_on_and_ends_at_the_same_weights(workshop, converted, tmp_path):
    out = tmp_path / "student"
    arguments = workshop.convert(out, "--no-evaluate")
    with subprocess.Popen(
        workshop.command(*arguments), env=workshop.environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while not list(out.glob(".rnnzoo/distill/checkpoint-*/complete")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.splitlines()[-1] == f"stopped; the same command goes on from here: rnnzoo {shlex.join(arguments)}"
    done = workshop.rnnzoo(*arguments)
    assert "distill: " in done.stderr and "align: " not in done.stderr and "distill: 0 of" not in done.stderr
    assert weights(out) == weights(converted)


@pytest.mark.slow
def test_killed_conversions_end_at_the_same_weights(workshop, converted, tmp_path):
    out = tmp_path / "student"
    command = workshop.command(*workshop.convert(out, "--no-evaluate"))
    killed = 0
    for stage_lines, seconds in ((1, 0.0), (2, 0.3), (3, 0.1), (4, 0.5), (5, 0.0), (6, 0.2)):
        killed += run_until_killed(command, workshop.environment, stage_lines, seconds) == -signal.SIGKILL
    assert killed >= 3, "the runs were too quick to be killed"
    workshop.rnnzoo(*workshop.convert(out, "--no-evaluate"))
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
