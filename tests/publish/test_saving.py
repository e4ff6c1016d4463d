"""`rnnzoo save`: a whole copy in a new folder, or one sentence and no trace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.publish import saving
from rnnzoo.publish.saving import save_model
from rnnzoo.publish.standalone import CODE_FILE
from rnnzoo.zoo.core.sizes import architecture_config, causal_lm_class


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model's folder as a training run leaves it."""
    folder = tmp_path_factory.mktemp("run") / "model"
    torch.manual_seed(0)
    config = architecture_config("gla")(hidden_size=32, num_hidden_layers=1, vocab_size=61)
    causal_lm_class("gla")(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"x")
    (folder / ".rnnzoo").mkdir()
    (folder / ".rnnzoo" / "state.json").write_text("{}")
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_copy_has_the_model_and_nothing_of_its_training(trained, tmp_path):
    out = save_model(trained, tmp_path / "new" / "copy")
    assert names(out) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_standalone_adds_the_code_and_where_to_find_it(trained, tmp_path):
    before = (trained / "config.json").read_bytes()
    out = save_model(trained, tmp_path / "copy", standalone=True)
    assert CODE_FILE in names(out)
    assert json.loads((out / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_rnnzoo.GLAConfig",
        "AutoModel": "modeling_rnnzoo.GLAModel",
        "AutoModelForCausalLM": "modeling_rnnzoo.GLAForCausalLM",
        "AutoModelForSequenceClassification": "modeling_rnnzoo.GLAForSequenceClassification",
    }
    assert (trained / "config.json").read_bytes() == before


def test_a_copy_of_a_copy_is_the_same(trained, tmp_path):
    first = save_model(trained, tmp_path / "first", standalone=True)
    second = save_model(first, tmp_path / "second", standalone=True)
    for name in (CODE_FILE, "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_with_rnnzoo_installed_its_own_classes_serve(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    out = save_model(trained, tmp_path / "copy", standalone=True)
    (out / CODE_FILE).write_text("raise SystemExit('code of the folder was run')\n")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__module__ == "rnnzoo.zoo.gla.modeling_gla"
    assert type(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)) is type(model)


def test_a_taken_folder_is_left_alone(trained, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(RnnzooError, match="already exists and is not empty"):
        save_model(trained, tmp_path / "taken")
    with pytest.raises(RnnzooError, match="already exists and is not empty"):
        save_model(trained, tmp_path / "taken" / "mine.txt")
    with pytest.raises(RnnzooError, match="own folder"):
        save_model(trained, trained)
    assert names(tmp_path) == {"taken", "taken/mine.txt"}


def test_an_empty_folder_is_taken(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in names(save_model(trained, tmp_path / "empty"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "no model of rnnzoo"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights"),
        (lambda folder: os.truncate(folder / "model.safetensors", 500), "safetensors"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(trained, tmp_path, spoil, words):
    shutil.copytree(trained, tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(RnnzooError, match=words):
        save_model(tmp_path / "bad", tmp_path / "parents" / "out", standalone=True)
    assert names(tmp_path) <= {"bad"} | {f"bad/{name}" for name in names(trained)}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_an_interrupted_copy_leaves_nothing(trained, tmp_path, monkeypatch, error):
    def stop(source, target):
        Path(target).write_bytes(b"half")
        raise error

    monkeypatch.setattr(saving.shutil, "copyfile", stop)
    with pytest.raises((KeyboardInterrupt, RnnzooError)):
        save_model(trained, tmp_path / "some" / "where" / "out", standalone=True)
    assert names(tmp_path) == set()


def test_the_command_says_where_the_copy_is(trained, tmp_path):
    def rnnzoo(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "rnnzoo", *arguments], capture_output=True, text=True)

    done = rnnzoo("save", str(trained), str(tmp_path / "out"), "--standalone", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"model": str(tmp_path / "out")}
    failed = rnnzoo("save", str(trained), str(tmp_path / "out"))
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
