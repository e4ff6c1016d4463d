"""Every example runs as it is, learns what it is meant to, and stays short."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"
SHARED = ("shared", "tiny_teacher")
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem not in SHARED)
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """(name, arguments) -> the script's variables, and what it printed."""

    def run_example(name: str, *arguments: str) -> tuple[dict, str]:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(tmp_path / "out")])
        names = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return names, capsys.readouterr().out

    return run_example


def test_examples_are_short():
    assert len(SCRIPTS) == 9 and NOTEBOOKS
    for path in (*SCRIPTS, *(FOLDER / f"{name}.py" for name in SHARED)):
        assert path.read_text().count("\n") < 60, path.name


def test_full_fine_tuning_learns_and_the_saved_model_answers(run):
    names, said = run("finetune_trainer")
    assert names["after"] < 0.2 * names["before"]
    assert "The fox lives in a den." in said


def test_lora_on_a_hybrid_adapts_recurrent_and_attention_layers_and_merges(run, tmp_path):
    pytest.importorskip("peft")
    names, _ = run("lora_hybrid")
    assert names["after"] < 0.3 * names["before"] and names["difference"] < 1e-3
    trained = {name for name, parameter in names["adapted"].named_parameters() if parameter.requires_grad}
    for i, kind in enumerate(names["layer_types"]):
        mixer = {name for name in trained if f"layers.{i}." in name and "mlp" not in name}
        assert mixer, f"no adapter in the mixer of layer {i}, {kind}"
        assert all("lora_" in name for name in mixer)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_sft_on_packed_rows_learns_the_answers(run):
    pytest.importorskip("trl")
    names, said = run("sft_packing")
    assert names["answer"] == "In a den." and "8 documents in 2 packed rows" in said


def test_dpo_prefers_what_it_was_told_to(run):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    names, _ = run("dpo")
    first, last = names["log"][0], names["log"][-1]
    assert last["rewards/margins"] > first["rewards/margins"] + 1 and last["rewards/accuracies"] == 1
    # The prompts are those of a chat, the answers differ: what is rejected has become less likely.
    assert last["rewards/rejected"] < last["rewards/chosen"]


def test_a_loop_with_accelerate_learns(run):
    names, said = run("accelerate_loop")
    assert len(names["losses"]) == 120 and names["losses"][-1] < 0.2 * names["losses"][0]
    assert "1 processes" in said


def test_a_base_model_becomes_recurrent_within_its_bytes(run):
    names, _ = run("convert_base_model", "--steps", "8")
    assert names["results"]["model"]["state_bytes"] <= 16_000
    assert [row["column"] for row in names["results"]["evaluation"]["perplexity"]] == ["student", "teacher", "window"]
    assert 0.99 * names["whole"]["value"] < names["student"]["value"] < 1.2 * names["whole"]["value"]
    branches = {row["branch"] for row in names["results"]["evaluation"]["ablations"]}
    assert branches == {"whole", "window", "linear"}


def test_a_chat_model_is_distilled_and_tuned_in_one_recipe(run):
    pytest.importorskip("trl")
    names, said = run("convert_chat_model")
    stages = {stage["name"]: stage for stage in names["results"]["conversion"]["stages"]}
    assert stages["chat"]["loss_last"] < 0.3 * stages["chat"]["loss_first"] and names["answer"].startswith("In a ")
    assert [line.split(":")[0] for line in said.splitlines() if ": loss " in line] == ["distill", "chat", "prefer"]


def test_a_hybrid_keeps_the_layer_that_matters_most(run):
    names, _ = run("convert_hybrid", "--steps", "4")
    assert sorted(names["kinds"]) == ["full_attention", "gated_delta_net"] and names["sizes"][0] < names["sizes"][1]


def test_a_new_family_is_one_class(run, monkeypatch):
    from rnnzoo.conversions.teachers import families

    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    names, _ = run("new_teacher_family", "--steps", "4")
    assert names["difference"] < 1e-4
    assert names["student"].config.layer_types == ["mamba2", "full_attention"]


def test_an_example_takes_a_folder(run, tmp_path):
    """What one example saved, another goes on from."""
    from rnnzoo.conversions.byte_tokenizer import byte_tokenizer
    from rnnzoo.zoo.gla.configuration_gla import GLAConfig
    from rnnzoo.zoo.gla.modeling_gla import GLAForCausalLM

    GLAForCausalLM(GLAConfig(vocab_size=258, hidden_size=32, num_hidden_layers=1)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    names, _ = run("finetune_trainer", str(tmp_path / "model"), "--steps", "2")
    assert names["model"].config.model_type == "rnnzoo-gla"
    assert names["trainer"].state.global_step == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_executes(path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    monkeypatch.chdir(FOLDER)
    names: dict = {}
    for number, cell in enumerate(notebook["cells"]):
        assert {"id", "cell_type", "metadata", "source"} <= set(cell)
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    assert names["losses"][-1] < 0.2 * names["losses"][0]
    recurrent, hybrid, attention = names["state_bytes"].values()
    assert len(set(recurrent)) == 1, "the recurrent state has grown"
    assert recurrent[-1] < hybrid[-1] < attention[-1] and attention[-1] == 32 * attention[0]
    assert max(names["difference"], names["leak"], names["rollback"]) < 1e-4
    assert torch.equal(names["plain"], names["guessed"])
    assert "The owl lives in a barn." in capsys.readouterr().out


def test_notebook_shows_its_output():
    """What a reader of the file sees is there: text under each code cell that prints, and the picture."""
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert all(cell["outputs"] for cell in cells if "print(" in "".join(cell["source"])), path.name
        assert "image/png" in json.dumps([cell["outputs"] for cell in cells])
        assert not re.search(r"Traceback|Warning", json.dumps(cells))


@pytest.mark.slow
def test_accelerate_on_two_processes_learns_as_one_does(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(FOLDER / "accelerate_loop.py"), "--steps", "60", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"2 processes, loss ([\d.]+) -> ([\d.]+)", done.stdout)
    assert found and float(found[2]) < 0.2 * float(found[1])
    assert done.stdout.count("The bee lives in") == 1 and (tmp_path / "model.safetensors").is_file()
