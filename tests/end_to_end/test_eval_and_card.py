"""`rnnzoo eval` on every kind of file beside the teacher, and `rnnzoo card` on what it wrote."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from rnnzoo import cli
from rnnzoo.conversions.evaluation import measures, runner

from .conftest import write_documents


@pytest.fixture(scope="module")
def measured(workshop, converted, tmp_path_factory) -> Path:
    """A copy of the converted folder, measured with three files."""
    folder = tmp_path_factory.mktemp("measured")
    model = folder / "student"
    shutil.copytree(converted, model)
    prose = " ".join(json.loads(line)["text"] for line in write_documents(folder / "x.jsonl", 60, 7).open())
    (folder / "prose.txt").write_text(prose)
    words = [{"context": "The old painter opens the", "target": "letter"}] * 5
    pairs = [{"sentence_good": "The river is old.", "sentence_bad": "The river are old."}] * 6
    for name, items in (("words", words), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    files = [word for name in ("prose.txt", "words.jsonl", "pairs.jsonl") for word in ("--data", str(folder / name))]
    command = ["eval", str(model), "--against", str(workshop.teacher), "--limits", "quick", "--quiet", *files]
    assert cli._run(command) == 0
    return model


def columns(results: dict, part: str, **where) -> set[str]:
    return {row["column"] for row in results["evaluation"][part] if where.items() <= row.items()}


def test_all_three_columns_are_measured_on_every_file(measured):
    results = json.loads((measured / "results.json").read_text())
    three = {"student", "teacher", "window"}
    assert columns(results, "perplexity", dataset="prose") == three
    assert columns(results, "tasks", task="words", n=5) == columns(results, "tasks", task="pairs", n=6) == three
    assert columns(results, "recall", distance=64) == columns(results, "decode", context=8192) == three
    state = {row["column"]: row["state_bytes"] for row in results["evaluation"]["decode"] if row["context"] == 8192}
    assert state["window"] <= state["student"] < state["teacher"]
    names = {path.stem for path in (measured / "plots").glob("*.png")}
    assert {"perplexity_by_position", "recall_by_distance", "decode_speed", "state_bytes", "layers"} <= names


def test_card_shows_what_was_measured_and_the_command_that_made_it(measured, workshop, capsys):
    assert cli._run(["card", str(measured)]) == 0
    assert capsys.readouterr().out == f"{measured / 'README.md'}\n"
    card = (measured / "README.md").read_text()
    assert "perplexity, prose" in card and "accuracy, pairs" in card and "sinks |" in card
    assert "--state-budget 12000 --tokens 6000 --seq-len 128 --seed 0 --dtype float32" in card
    assert "window's keys in 8 and values in 4 bits" in card
    assert str(workshop.teacher.parent) not in card and "\0" not in card


def test_one_column_is_measured_anew_and_the_others_stay(measured, capsys):
    assert cli._run(["eval", str(measured), "--columns", "student", "--limits", "quick", "--json"]) == 0
    shown, said = capsys.readouterr()
    results = json.loads(shown)
    assert columns(results, "perplexity", dataset="prose") == {"student", "teacher", "window"}
    assert "without --against TEACHER" in said


def test_harness_tasks_are_asked_for_by_name(measured, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = ["eval", str(measured), "--limits", "quick", "--quiet", "--lm-eval", "piqa"]
    assert cli._run(command) == 1
    assert "pip install 'rnnzoo[eval]'" in capsys.readouterr().err

    row = {"task": "piqa", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 100}
    monkeypatch.setattr(runner, "require_lm_eval", lambda tasks: None)
    monkeypatch.setattr(measures, "lm_eval_tasks", lambda model, tokenizer, tasks, **options: [row])
    assert cli._run(command) == 0
    assert "piqa, acc (n = 100)" in capsys.readouterr().out
