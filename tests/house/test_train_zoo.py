"""`scripts/train_zoo.py`: equal parameters, one file a result, nothing done twice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rnnzoo.benchmarks.learning import config_of, learn, make_task
from rnnzoo.benchmarks.learning_report import table
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.registry import architectures
from rnnzoo.zoo.core.sizes import parameter_count

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_zoo.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("train_zoo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} green bottles hanging on the wall, " for i in range(600)))
    return str(path)


@pytest.mark.parametrize("name", architectures())
def test_widths_give_equal_parameters(name):
    task = make_task("parity")
    wanted = 1_000_000 * task.share
    assert 0.85 * wanted < parameter_count(config_of(name, task, round(wanted))) < 1.18 * wanted


def test_a_small_model_learns_and_its_figures_are_plausible(text):
    told = []
    record = learn(
        "supra",
        make_task("text", text),
        parameters=60_000,
        steps=24,
        progress=lambda done, total, loss: told.append(done),
    )
    first, last = record["train_loss"]
    assert last < 0.85 * first and record["loss"] < first
    assert told == [1, 21, 24] and record["tokens_per_second"] > 0 and record["state_bytes"] > 0


def test_sweep_writes_results_table_and_plot_and_does_nothing_twice(script, text, tmp_path, monkeypatch):
    tasks = ("text", "recall", "parity")
    arguments = ["--arch", "supra", "--arch", "mamba2", "--steps", "2", "--parameters", "150k", "--out", str(tmp_path)]
    arguments += ["--text", text, *(word for task in tasks for word in ("--task", task))]
    done = CliRunner().invoke(script.main, arguments)
    assert done.exit_code == 0, done.output
    files = {path.stem for path in tmp_path.glob("*.json")}
    assert files == {f"{name}-{task}" for name in ("supra", "mamba2") for task in tasks}
    record = json.loads((tmp_path / "supra-parity.json").read_text())
    assert record["steps"] == 2 and set(record["by_length"]) >= {"40", "256"}
    words = (tmp_path / "zoo.md").read_text()
    assert (
        "| supra |" in words
        and words.splitlines()[0].startswith("| architecture | parameters | text, loss |")
        and (tmp_path / "zoo.png").stat().st_size > 10_000
    )

    (tmp_path / "supra-parity.json").write_text("{cut off")
    again = []
    monkeypatch.setattr(script, "learn", lambda name, task, **kwargs: again.append((name, task.name)) or record)
    assert CliRunner().invoke(script.main, arguments).exit_code == 0
    assert again == [("supra", "parity")]
    assert json.loads((tmp_path / "supra-parity.json").read_text()) == record


def test_one_failure_stops_no_sweep_and_is_told(script, tmp_path, monkeypatch):
    real = script.learn

    def learn(name, task, **kwargs):
        if name == "supra":
            raise RuntimeError("no")
        return real(name, task, **kwargs)

    monkeypatch.setattr(script, "learn", learn)
    arguments = ["--arch", "supra", "--arch", "mamba2", "--task", "parity", "--steps", "1", "--parameters", "150k"]
    done = CliRunner().invoke(script.main, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 1 and "supra on parity: RuntimeError: no" in done.output
    assert [path.name for path in tmp_path.glob("*.json")] == ["mamba2-parity.json"]


def test_what_was_not_measured_is_a_dash_and_bad_input_is_told(script, tmp_path):
    record = {"architecture": "gla", "task": "recall", "parameters": 150_000, "accuracy": 0.5}
    assert table([record]).splitlines()[-1] == "| gla | 150,000 | - | 50 % | - | - | - | - | - |"
    with pytest.raises(RnnzooError, match="--text"):
        make_task("text")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(RnnzooError, match="has 5 bytes"):
        make_task("text", tmp_path / "short.txt")
    done = CliRunner().invoke(script.main, ["--arch", "rnn", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "'rnn' is no architecture" in done.output
