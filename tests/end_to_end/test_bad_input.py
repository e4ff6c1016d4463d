"""What users bring by mistake: one sentence on stderr, exit code 1 (2 for wrong usage), and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from rnnzoo import cli

from ..conversions.test_teachers_gguf import write_gguf
from ..conversions.tiny import tiny_model


@pytest.fixture
def refused(workshop, tmp_path, capsys, monkeypatch):
    """Calls a conversion that cannot begin: `refused("--keep", "9")` adds options, keywords replace the usual ones."""
    for name, value in workshop.environment.items():
        if name.startswith(("HF_", "RNNZOO_")):
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("RNNZOO_DEBUG", raising=False)
    out = tmp_path / "student"

    def call(*options: str, code: int = 1, teacher=workshop.teacher, recipe=workshop.recipe, data=workshop.data) -> str:
        capsys.readouterr()
        small = ["--tokens", "2k", "--seq-len", "64", "--quiet", "--no-evaluate"]
        base = ["convert", str(teacher), "--recipe", str(recipe), "--out", str(out), "--data", str(data)]
        assert cli._run([*base, *small, *options]) == code
        shown, said = capsys.readouterr()
        assert shown == "" and not out.exists()
        return one_sentence(said)

    return call


def one_sentence(said: str) -> str:
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 500, said
    assert not re.search(r"Traceback|RNNZOO_DEBUG", said), said
    return said


def teacher_folder(folder: Path, **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_teachers_that_are_none(refused, workshop, tmp_path):
    bert = teacher_folder(tmp_path / "bert", model_type="bert", architectures=["BertForMaskedLM"])
    assert "encoder-only" in refused(teacher=bert)
    assert "unsupported architecture 'gpt2'" in refused(teacher=teacher_folder(tmp_path / "gpt2", model_type="gpt2"))
    assert "no folder ./absent" in refused(teacher="./absent")
    assert "some/model" in refused(teacher="some/model")  # a Hub id while the Hub is out of reach
    gguf = write_gguf(tmp_path / "x.gguf", tiny_model(), "llama", architecture="gemma2")
    assert "GGUF architecture 'gemma2'" in refused(teacher=gguf)


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_corrupt_weights(refused, workshop, tmp_path, damage):
    teacher = tmp_path / "teacher"
    shutil.copytree(workshop.teacher, teacher)
    file = teacher / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-100], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage])
    assert "model.safetensors" in refused(teacher=teacher)


def test_recipes_that_are_none(refused, tmp_path):
    assert "no recipe 'absent'; known are" in refused(recipe="absent")

    def recipe(text: str) -> str:
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        return refused(recipe=file)

    stage = "stages: [{name: distill, kind: train, share: 1.0}]"
    assert "no mixer 'abacus'; known are" in recipe(f"student: abacus\n{stage}")
    assert "unknown key 'studnet'" in recipe(f"student: supra\nstudnet: supra\n{stage}")
    assert "unknown key 'tokens'" in recipe("student: supra\nstages: [{name: a, kind: train, tokens: 5}]")
    assert "tokens is 'many'; expected int" in recipe(f"student: supra\ntokens: many\n{stage}")
    assert "lacks the key 'student'" in recipe(stage)
    assert "stages must be a list" in recipe("student: supra")
    assert "not readable YAML" in recipe("student: [")
    assert "kind is 'pray'" in recipe("student: supra\nstages: [{name: a, kind: pray}]")
    assert "wisdom" in recipe(f"student: hedgehog\nstudent_options: {{wisdom: 3}}\n{stage}")
    assert "num_sinks" in recipe(f"student: hedgehog\nstudent_options: {{num_sinks: lots}}\n{stage}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--keep", "0,7"], "no layer 7; the teacher's layers are 0 to 1"),
        (["--keep", "1/9"], "between 1/2 and 1/1"),
        (["--keep", "most"], "neither none"),
        (["--seq-len", "4096"], "512"),
        (["--state-budget", "60B"], "too small"),
        (["--text-field", "body"], "body"),
    ],
)
def test_values_out_of_range(refused, options, says):
    assert says in refused(*options)


def test_wrong_usage_is_exit_2(refused):
    assert "4MB" in refused("--state-budget", "much", code=2)
    assert "--see-len" in refused("--see-len", "64", code=2)


def test_data_that_is_none(refused, tmp_path):
    def data(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return refused(data=tmp_path / name)

    assert "empty.txt" in data("empty.txt", b"")
    assert "blank.txt" in data("blank.txt", b" \n\n ")
    assert "binary.txt" in data("binary.txt", bytes(range(256)) * 20)
    assert "broken.jsonl" in data("broken.jsonl", b'{"text": "whole"}\n{"text": \n')
    assert "absent.txt" in refused(data=tmp_path / "absent.txt")
    (tmp_path / "folder").mkdir()
    assert "folder" in refused(data=tmp_path / "folder")
    assert "short.txt" in data("short.txt", b"Too short to hold anything out.")


def test_output_folder_that_holds_something_else_stays_as_it_is(workshop, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for options in ([], ["--restart"]):
        assert cli._run(workshop.convert(mine, "--quiet", *options)) == 1
        assert "holds something else (thesis.tex)" in one_sentence(capsys.readouterr().err)
    assert [file.name for file in mine.iterdir()] == ["thesis.tex"]
    assert cli._run(workshop.convert(mine / "thesis.tex", "--quiet")) == 2
    assert "is a file" in one_sentence(capsys.readouterr().err)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_no_permission_to_write(workshop, tmp_path, capsys):
    if os.geteuid() == 0:
        # root may write anywhere but there
        where = Path("/proc/rnnzoo-student")
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        where = tmp_path / "closed" / "student"
    assert cli._run(workshop.convert(where, "--quiet")) == 1
    assert str(where) in one_sentence(capsys.readouterr().err)
    assert not where.exists()


def test_full_disk_is_said_and_the_same_command_goes_on(workshop, converted, tmp_path, capsys, monkeypatch):
    import safetensors.torch
    from transformers import PreTrainedModel

    whole = PreTrainedModel.save_pretrained

    def full(self, folder, **options):
        whole(self, folder, **options)
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    out = tmp_path / "student"
    command = workshop.convert(out, "--quiet", "--no-evaluate")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert cli._run(command) == 1
    assert "disk is full" in one_sentence(capsys.readouterr().err)
    assert not out.exists()  # no stage was finished: nothing to go on from

    monkeypatch.undo()
    assert cli._run(command) == 0
    assert (out / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def test_other_commands_on_what_is_no_model(workshop, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    before = sorted(tmp_path.iterdir())
    for arguments in (
        ["eval", str(tmp_path)],
        ["eval", str(tmp_path / "absent")],
        ["card", str(tmp_path)],
        ["generate", str(tmp_path), "Hello"],
        ["plan", str(tmp_path)],
        ["plan", str(workshop.teacher), "--keep", "0,9"],
    ):
        assert cli._run([*arguments, "--quiet"]) == 1, arguments
        one_sentence(capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


def test_evaluation_data_that_is_none(converted, tmp_path, capsys):
    before = {file: file.stat().st_mtime_ns for file in converted.rglob("*")}
    for name, content, says in (
        ("empty.txt", b"", "empty"),
        ("binary.txt", bytes(range(256)), "not readable text"),
        ("fields.jsonl", b'{"question": "?"}\n', "question"),
        ("broken.jsonl", b'{"text":', "not JSON lines"),
    ):
        (tmp_path / name).write_bytes(content)
        assert cli._run(["eval", str(converted), "--quiet", "--data", str(tmp_path / name)]) == 1
        assert says in one_sentence(capsys.readouterr().err)
    assert cli._run(["eval", str(converted), "--quiet", "--columns", "teacher"]) == 2
    assert "--against" in one_sentence(capsys.readouterr().err)
    assert {file: file.stat().st_mtime_ns for file in converted.rglob("*")} == before
