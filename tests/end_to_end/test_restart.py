"""Kill a conversion at any moment and start it again: the weights are those of an undisturbed run, bit for bit."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import time
from pathlib import Path

import pytest


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
    workshop.rnnzoo(*workshop.convert(converted, "--no-evaluate"))
    assert weights(converted) == before
    assert times == {file.name: file.stat().st_mtime_ns for file in converted.glob("*.safetensors")}


def test_changed_options_are_refused_with_the_difference(workshop, converted):
    done = workshop.rnnzoo(*workshop.convert(converted, "--no-evaluate", "--seed", "7"), check=False)
    assert done.returncode == 1 and "--restart" in done.stderr and "seed" in done.stderr
    assert "Traceback" not in done.stderr
