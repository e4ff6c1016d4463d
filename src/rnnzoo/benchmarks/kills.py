"""Conversions killed (SIGKILL) at random moments, gone on with, and compared with one that nobody disturbed."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..kernels.errors import RnnzooError
from ..zoo.core.files import expect_free

__all__ = ["Outcome", "Setting", "kill_and_compare", "tiny_setting"]

SENTENCES = 40


class Setting(NamedTuple):
    """A teacher folder and a file of text."""

    teacher: Path
    text: Path


class Outcome(NamedTuple):
    """Seconds from a run's start to its kill; are the weights those of the undisturbed run, bit by bit?"""

    seconds: float
    same: bool
    words: str


def tiny_setting(folder: Path) -> Setting:
    """A random Llama of width 48 and 4 layers with a byte tokenizer, and made-up prose, in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..conversions.byte_tokenizer import byte_tokenizer
    from ..conversions.evaluation.recall import filler_text

    folder.mkdir(parents=True, exist_ok=True)
    teacher, text = folder / "teacher", folder / "text.jsonl"
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    documents = [{"text": filler_text(SENTENCES, seed)} for seed in range(60)]
    text.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return Setting(teacher, text)


def _command(setting: Setting, recipe: str, out: Path) -> list[str]:
    sizes = ["--tokens", "8192", "--seq-len", "128", "--dtype", "float32", "--no-evaluate"]
    sizes += ["--state-budget", "40kB"] if recipe == "rnnzoo" else []
    command = [sys.executable, "-m", "rnnzoo", "convert", str(setting.teacher), "--recipe", recipe, "--quiet"]
    return [*command, "--data", str(setting.text), "--out", str(out), *sizes]


def _weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def kill_and_compare(setting: Setting, recipe: str, number: int, out: Path, chance: random.Random) -> Iterator[Outcome]:
    """`number` conversions, each killed once somewhere in the time that an undisturbed one takes, and run again.

    Raises:
        RnnzooError: the undisturbed run fails, or `out` is not empty.
    """
    expect_free(out)
    started = time.monotonic()
    plain = subprocess.run(_command(setting, recipe, out / "whole"), capture_output=True, text=True)
    if plain.returncode:
        raise RnnzooError(f"The recipe {recipe} fails without any kill: {plain.stderr.strip()[-300:]}")
    whole, expected = time.monotonic() - started, _weights(out / "whole")
    for i in range(number):
        folder = out / f"killed-{i}"
        when = chance.uniform(0.05, 1.0) * whole
        process = subprocess.Popen(_command(setting, recipe, folder), stdout=subprocess.DEVNULL)
        try:
            process.wait(when)
            words = "it had ended before"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            words = "killed and run again"
        again = subprocess.run(_command(setting, recipe, folder), capture_output=True, text=True)
        if again.returncode:
            yield Outcome(when, False, f"{words}: {again.stderr.strip()[-200:]}")
            continue
        same = _weights(folder) == expected
        yield Outcome(when, same, f"{words}: {'the same weights' if same else 'OTHER WEIGHTS'}")
