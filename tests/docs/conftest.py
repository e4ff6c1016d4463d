"""What the documentation's snippets find in their folder: tiny things under the names that the pages use."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

from rnnzoo import cli

from ..conversions.tiny import tiny_teacher
from ..end_to_end.conftest import write_documents, write_recipe

ROOT = Path(__file__).resolve().parents[2]
TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="session", autouse=True)
def scripts_on_the_path():
    """The modules that make pages and pictures."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher where a Hub id points, a converted model, text, and a Mamba of transformers."""
    folder = tmp_path_factory.mktemp("furnished")
    (folder / TEACHER).parent.mkdir()
    shutil.move(tiny_teacher("llama", folder), folder / TEACHER)
    write_documents(folder / "text.jsonl", 60)
    recipe = write_recipe(folder / "small.yaml")
    arguments = f"--recipe {recipe} --data {folder / 'text.jsonl'} --out {folder / 'quickstart-model'}"
    small = "--tokens 2k --seq-len 128 --state-budget 12kB --dtype float32 --no-evaluate --quiet"
    assert cli._run(["convert", str(folder / TEACHER), *arguments.split(), *small.split()]) == 0
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    transformers.MambaForCausalLM(config).save_pretrained(folder / "mamba-checkpoint")
    return folder


@pytest.fixture
def folder(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_tokens: None) -> Path:
    """A copy of it, which is the current folder; no network, the choice of kernels as it is without settings."""
    copy = tmp_path / "here"
    shutil.copytree(furnished, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RNNZOO_BACKEND", raising=False)
    return copy
