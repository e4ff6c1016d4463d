"""A results.json whose numbers nobody measured, for the shape of the card only."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from rnnzoo.cards.plots import write_plots

COLUMNS = ("student", "teacher", "window")


def invented() -> dict[str, Any]:
    """Numbers that nobody measured, for the shape of the card only."""
    values = dict(zip(COLUMNS, (12.5, 10.0, 20.25), strict=True))
    evaluation = {
        "columns": list(COLUMNS),
        "window_baseline": {"window": 61, "sinks": 4, "state_bytes": 1_500_000, "context": 2048},
        "datasets": [{"name": "invented/test", "kind": "text", "size": "1 documents, 9 bytes", "sha256": "ab" * 32}],
        "perplexity": [
            {
                "dataset": "invented/test", "window": 2048, "stride": None, "column": column, "value": value,
                "stderr": 0.4, "bits_per_byte": value / 10, "n_tokens": 61_410, "n_windows": 30,
            }
            for column, value in values.items()
        ],
        "tasks": [
            {"task": "pairs", "column": column, "metric": "accuracy", "value": value, "stderr": 0.02, "n": 300}
            for column, value in zip(COLUMNS, (0.74, 0.8, 0.7), strict=True)
        ],
        "recall": [
            {"distance": d, "column": c, "accuracy": a, "stderr": 0.1, "n": 16, "chance": 0.1}
            for d, accuracies in ((64, (1.0, 1.0, 1.0)), (1024, (0.6, 0.9, 0.1)), (8192, (0.1, 0.1, 0.1)))
            for c, a in zip(COLUMNS, accuracies, strict=True)
        ],
        "decode": [
            {
                "context": n, "column": c, "tokens_per_second": speed, "state_bytes": size, "device": "An invented CPU",
                "dtype": "bfloat16",
            }
            for n in (1024, 32_768)
            for c, speed, size in (("student", 9, 1_500_000), ("teacher", 9e3 / n, 23_040 * n), ("window", 9, 149))
        ],
        "parity": [
            {"column": "student", "context": 448, "n": 64, "max_probability": 0.0045, "max_abs": 0.0123,
             "mean_kl": 2e-5, "same_token": 0.96875, "dtype": "bfloat16"}
        ],
        "by_position": [
            {"start": a, "end": b, "column": c, "perplexity": values[c] + i, "n_tokens": b - a, "dataset": "A book"}
            for i, (a, b) in enumerate(((0, 2048), (2048, 4096), (4096, 8192)))
            for c in COLUMNS
            if (c, a) != ("teacher", 4096)
        ],
    }  # fmt: skip
    return {
        "schema": 1,
        "created": "2001-02-03T04:05:06+00:00",
        "rnnzoo_version": "0.1.0",
        "model": {
            "name": "invented-135m",
            "architecture": "hedgehog",
            "model_type": "rnnzoo-hedgehog",
            "parameters": 134_515_008,
            "dtype": "bfloat16",
            "layer_types": ["hedgehog", "hedgehog", "full_attention", "hedgehog"],
            "windows": [[64, 8], [64, 8], [], [128, 16]],
            "state_bytes": 1_500_000,
        },
        "teacher": {
            "name": "someone/Invented-135M", "sha": "abc123", "licence": "Apache-2.0", "parameters": 134_515_008,
            "revision": "main",
        },
        "recipe": {"name": "rnnzoo", "sha256": "cd" * 32, "yaml": "name: rnnzoo\nstages:\n- align\n"},
        "conversion": {
            "tokens": 500_000,
            "seconds": 1234.5,
            "hardware": "An invented CPU, 2 threads",
            "stages": [
                {"name": "align", "tokens": 200_000, "seconds": 5, "loss_first": 1, "loss_last": 0.1,
                 "perplexity": 30.0, "perplexity_stderr": 2.0, "perplexity_tokens": 4094},
                {"name": "distill", "tokens": 300_000, "seconds": 734.5, "loss_first": 0.4, "loss_last": 0.2,
                 "perplexity": 13.0, "perplexity_stderr": 1.0, "perplexity_tokens": 4094},
            ],
            "teacher_perplexity": {"value": 10.5, "stderr": 0.7},
            "data": {"training": {"source": "prose", "tokens": 500_000, "sha256": "ef" * 32}},
        },
        "evaluation": evaluation,
        "snippet": {"code": "print('An invented')\nprint('answer.')\n", "output": "An invented\nanswer.\n"},
        "samples": [{"prompt": "What | is this?", "output": "An invented\nsample."}],
        "environment": {"python": "3.11", "torch": "2.13.0"},
    }  # fmt: skip


def write(folder, results, pictures=True):
    """A folder with these results, and the pictures of the invented ones: those of other numbers are drawn again."""
    (folder / "results.json").write_text(json.dumps(results))
    if pictures and "evaluation" in results:
        shutil.copytree(drawn(), folder, dirs_exist_ok=True)
    return folder


@functools.cache
def drawn():
    """The pictures of the invented results, drawn once in a process: that takes two seconds."""
    folder = Path(tempfile.mkdtemp(prefix="rnnzoo-pictures-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_plots(invented(), folder)
    return folder


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def section(text: str, name: str) -> str:
    """What stands under a heading of a card."""
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]
