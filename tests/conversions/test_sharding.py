"""FSDP2 and activation checkpointing change what is in memory, not what is learnt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rnnzoo.conversions.convert import convert
from rnnzoo.zoo.core.layers import MLP

from ..end_to_end.conftest import write_documents
from .test_processes import RECIPE, assert_same_end
from .tiny import tiny_teacher

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
SMALL = {"dtype": "float32", "evaluate": False}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[str, str, list[str], Path]:
    """Teacher, recipe, data, and the run of one process."""
    folder = tmp_path_factory.mktemp("given")
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    data = [str(write_documents(folder / "text.jsonl", 300))]
    teacher = str(tiny_teacher("llama", folder))
    convert(teacher, str(recipe), folder / "alone", data=data, **SMALL)
    return teacher, str(recipe), data, folder / "alone"


def test_checkpointed_activations_end_at_the_same_weights(given, tmp_path, monkeypatch):
    """Every gradient of every step, in fact: the weights are equal bit for bit."""
    teacher, recipe, data, alone = given
    runs, forward = [], MLP.forward

    def counted(self, hidden):
        runs.append(torch.is_grad_enabled())
        return forward(self, hidden)

    monkeypatch.setattr(MLP, "forward", counted)
    convert(teacher, recipe, tmp_path / "model", data=data, **SMALL, activation_checkpointing=True)
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "model", alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps, rows, layers = 6, 4, 2
    assert sum(runs) >= 2 * steps * rows * layers  # each block of the student twice: forwards, and for its gradient


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_sharded_student_and_teacher_end_where_whole_ones_do(given, tmp_path, checkpointing):
    teacher, recipe, data, alone = given
    said = sharded(teacher, recipe, data, tmp_path / "model", checkpointing)
    assert len(said) == 4  # two stages, two processes
    assert_same_end(tmp_path / "model", alone)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["hedgehog", "mamba2"])
def test_sharded_layers_learn_the_matrices_that_whole_ones_do(given, tmp_path, student):
    teacher, _, data, _ = given
    align = {"name": "align", "kind": "align", "share": 1.0, "new_lr": 1e-2, "target": "matrices", "loss": "norm"}
    options = RECIPE["student_options"] if student == "hedgehog" else {}
    recipe = tmp_path / "matrices.yaml"
    changes = {"student": student, "student_options": options, "state_budget": None, "stages": [align]}
    recipe.write_text(yaml.safe_dump(RECIPE | changes))
    convert(teacher, str(recipe), tmp_path / "alone", data=data, **SMALL)
    said = sharded(teacher, str(recipe), data, tmp_path / "model")
    assert len(said) == 2
    assert_same_end(tmp_path / "model", tmp_path / "alone", ["align"])


def sharded(teacher: str, recipe: str, data: list[str], out: Path, checkpointing: str = "false") -> list[str]:
    """Converts by two processes; returns what they say of the stages: units, and shares of the parameters held."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = ["convert", teacher, "--recipe", recipe, "--data", data[0], "--out", str(out), "--dtype", "float32"]
    environment = os.environ | FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": checkpointing}
    done = subprocess.run(
        [*start, str(Path(__file__).with_name("fsdp_on_cpu.py")), *asked, "--no-evaluate"],
        capture_output=True, text=True, timeout=1200, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.findall(r"units (\d+), share (\d\.\d\d)", done.stderr)
    for units, share in found:  # blocks, their mixers, embeddings with head and norm, and the model
        assert int(units) >= 6 and share == "0.50"
    return found
