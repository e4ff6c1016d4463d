"""No command runs code that comes with a model, unless the user says --trust-remote-code."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from rnnzoo import cli
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError

from ..conversions.tiny import tiny_teacher
from .conftest import write_documents

CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel", "AutoModelForCausalLM": "evil.EvilModel"}


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that appears when the code is run; and a cache of dynamic modules of its own."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked, where nobody may answer"))
    return tmp_path / "ran"


@pytest.fixture(params=["unknown type", "known type", "tokenizer"])
def evil(request, tmp_path, mark):
    """A folder whose auto_map names evil.py: for its own type, for one that transformers knows, for a tokenizer."""
    folder = tiny_teacher("llama", tmp_path)
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    if request.param == "unknown type":
        change(folder / "config.json", model_type="evil", auto_map=AUTO)
    elif request.param == "known type":
        change(folder / "config.json", auto_map=AUTO)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]})
    if request.param == "tokenizer":
        change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    return folder.rename(tmp_path / request.param.replace(" ", "-"))


def commands(folder, tmp_path):
    out = str(tmp_path / "out")
    text = str(write_documents(tmp_path / "text.jsonl", 300))
    tiny = ("--hidden-size", "16", "--layers", "1", "--context", "32", "--no-evaluate")
    small = ("--tokens", "2k", "--seq-len", "64", "--no-evaluate")
    return [
        ("generate", str(folder), "Hello", "--max-new-tokens", "2"),
        ("eval", str(folder), "--limits", "quick", "--data", text),
        ("plan", str(folder)),
        ("convert", str(folder), "--recipe", "supra", "--out", out, "--data", text, *small),
        ("import", str(folder), "--as", "transformer", "--out", out),
        ("train", "--arch", "mingru", "--tokenizer", str(folder), "--data", text, "--out", out, "--steps", "1", *tiny),
    ]


@pytest.mark.parametrize("number", range(6), ids=["generate", "eval", "plan", "convert", "import", "train"])
def test_code_of_a_model_is_not_run(evil, tmp_path, mark, capsys, number, monkeypatch):
    # Whether a command can do its work without that code is another matter: some do, the others say so.
    if number == 1:
        monkeypatch.setattr("rnnzoo.conversions.evaluation.runner._measure_all", lambda *_: {})
    code = cli._run([*commands(evil, tmp_path)[number], "--quiet"])
    err = capsys.readouterr().err
    if evil.name == "known-type":
        assert code == 0, err  # transformers' own class serves
    assert not mark.exists(), err
    assert err == "" or (err.count("\n") == 1 and err.startswith("error: "))


def test_what_needs_its_own_code_says_so_and_runs_when_trusted(tmp_path, mark, capsys):
    folder = tiny_teacher("llama", tmp_path)
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    change(folder / "config.json", model_type="evil", auto_map=AUTO, architectures=["EvilModel"])
    asked = ["generate", str(folder), "Hello", "--max-new-tokens", "2", "--greedy", "--raw", "--json", "--quiet"]
    assert cli._run(asked) == 1
    assert "needs Python code of its own" in capsys.readouterr().err and not mark.exists()
    assert cli._run(["eval", str(folder), "--quiet"]) == 1
    assert "--trust-remote-code" in capsys.readouterr().err and not mark.exists()
    assert cli._run([*asked, "--trust-remote-code"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] >= 1 and mark.exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_weights_are_read_as_tensors_alone_or_not_at_all(tmp_path, mark, capsys):
    folder = tiny_teacher("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(str(mark))}, folder / "pytorch_model.bin")
    for command in commands(folder, tmp_path)[:5]:
        reads = command[0] != "plan"  # which needs the configuration alone
        assert cli._run([*command, "--quiet"]) == reads, command
        assert capsys.readouterr().err.startswith("error: ") == reads
    with pytest.raises(RnnzooError, match=r"no model\.safetensors"):
        resolve_teacher(str(folder))
    assert not mark.exists()


def test_a_pickle_under_a_name_of_safetensors_is_no_way_in(tmp_path, mark, capsys):
    folder = tiny_teacher("llama", tmp_path)
    torch.save({"x": Evil(str(mark))}, folder / "evil.bin")
    shutil.move(folder / "evil.bin", folder / "model.safetensors")
    for command in commands(folder, tmp_path)[:5]:
        assert cli._run([*command, "--quiet"]) == 1, command
        assert capsys.readouterr().err.startswith("error: ")
    assert not mark.exists()
