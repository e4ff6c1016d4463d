"""One tiny conversion through the command line, shared by the tests of this folder."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from rnnzoo import cli
from rnnzoo.conversions.recipes import FOLDER
from rnnzoo.kernels.native import cache_folder

from ..conversions.tiny import tiny_teacher, tiny_tokenizer
from ..hub_double import HubDouble

NOUNS = "river mountain teacher garden window letter engine winter harbour painter forest market".split()
VERBS = "follows crosses remembers builds paints carries opens watches answers leaves".split()
ADJECTIVES = "quiet old narrow bright heavy distant early careful green broken".split()


def write_documents(path: Path, count: int, seed: int = 0) -> Path:
    """`count` different small documents of made-up sentences, one a JSON line."""
    import json

    draw = random.Random(seed)

    def sentence() -> str:
        return (
            f"The {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(ADJECTIVES)} "
            f"{draw.choice(NOUNS)} in the {draw.choice(NOUNS)} number {draw.randrange(10**6)}."
        )

    lines = [json.dumps({"text": " ".join(sentence() for _ in range(draw.randrange(4, 12)))}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_recipe(path: Path) -> Path:
    """The default recipe with optimiser steps of 512 tokens, so that 6,000 tokens are several steps."""
    recipe = yaml.safe_load((FOLDER / "rnnzoo.yaml").read_text())
    path.write_text(yaml.safe_dump(recipe | {"batch_tokens": 512}))
    return path


@dataclass(frozen=True)
class Workshop:
    """A tiny teacher, its data, the default recipe with small steps, and the environment in which commands run: no
    network, a cache with nothing but built kernels, one thread."""

    teacher: Path
    data: Path
    recipe: Path
    environment: dict[str, str]

    def rnnzoo(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, env=self.environment)
        assert not check or done.returncode == 0, done.stderr
        return done

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "rnnzoo_command", *arguments]

    def python(self, script: str, *arguments: str) -> str:
        """Run a script in a fresh process; returns its stdout."""
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def convert(self, out: Path, *options: str) -> list[str]:
        """The arguments of a conversion of seconds."""
        small = ("--tokens", "6k", "--seq-len", "128", "--state-budget", "12kB", "--dtype", "float32")
        return [
            "convert",
            str(self.teacher),
            "--recipe",
            str(self.recipe),
            "--out",
            str(out),
            "--data",
            str(self.data),
            *small,
            *options,
        ]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RNNZOO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    cache_folder().mkdir(parents=True, exist_ok=True)
    (folder / "cache").mkdir()
    (folder / "cache" / "kernels").symlink_to(cache_folder())
    environment.pop("RNNZOO_DEBUG", None)
    environment.pop("RNNZOO_NO_REGISTER", None)
    data = write_documents(folder / "text.jsonl", 400)
    return Workshop(tiny_teacher("llama", folder), data, write_recipe(folder / "small.yaml"), environment)


@pytest.fixture(scope="session")
def converted(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `rnnzoo convert` made, without evaluation."""
    out = tmp_path_factory.mktemp("converted") / "student"
    workshop.rnnzoo(*workshop.convert(out, "--no-evaluate", "--quiet"))
    return out


@pytest.fixture
def small_model(tmp_path) -> Path:
    """A tiny model in three files of weights, with a card by hand and things that must stay at home."""
    folder = tmp_path / "model"
    import torch

    from rnnzoo.zoo.supra.configuration_supra import SupraConfig
    from rnnzoo.zoo.supra.modeling_supra import SupraForCausalLM

    torch.manual_seed(0)
    size = dict(vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=6)
    SupraForCausalLM(SupraConfig(**size)).save_pretrained(folder, max_shard_size="120kB")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (folder / "plots").mkdir()
    (folder / "plots" / "recall.png").write_bytes(b"\x89PNG")
    (folder / "modeling_tiny.py").write_text("# code that goes along\n")
    for stays in (
        ".rnnzoo/run.json",
        ".rnnzoo/align/optimizer.pt",
        "evaluation.json",
        "train.log",
        "checkpoint-5/x.bin",
    ):
        (folder / stays).parent.mkdir(parents=True, exist_ok=True)
        (folder / stays).write_text("{}")
    return folder


@pytest.fixture
def push(hub: HubDouble, tmp_path, capsys, monkeypatch):
    """`rnnzoo push` of a folder to the double, with the exit code `code`; in this process, which has all loaded."""

    def run(
        folder,
        *options: str,
        token: str | None = "hf_alice",
        repo: str = "alice/tiny",
        code: int = 0,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        # Writing the model's code takes seconds; who wants it says --code.
        code_option = () if "--code" in options else ("--no-code",)
        arguments = ["push", str(folder), repo, *code_option, *options]
        capsys.readouterr()
        with monkeypatch.context() as patch:
            hub.serve(patch, tmp_path / "home", token, **environment)
            done = cli._run(arguments)
        out, err = capsys.readouterr()
        assert done == code, err
        return subprocess.CompletedProcess(arguments, done, out, err)

    return run
