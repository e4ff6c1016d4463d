"""Checkpoints of other implementations into the zoo's format: names are mapped, tensors stream shard by shard.

An architecture that has such checkpoints provides `zoo/<name>/importing_<name>.py` with

    convert_config(source: dict) -> RecurrentConfig     from the other config.json; RnnzooError where it does not fit
    rename(name: str) -> str                            from the other tensor name
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import shutil
import tempfile

import safetensors
from safetensors.torch import save_file

from ...kernels.errors import RnnzooError
from .registry import architectures, config_class

__all__ = ["import_checkpoint", "importable"]

# Everything but weights and configuration goes along as it is: tokenizer, chat template, generation settings.
COPIED = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)


def importable() -> tuple[str, ...]:
    """Architectures that can be imported."""
    zoo = pathlib.Path(__file__).resolve().parent.parent
    return tuple(name for name in architectures() if (zoo / name / f"importing_{name}.py").is_file())


def import_checkpoint(source: str | os.PathLike, architecture: str, out: str | os.PathLike) -> pathlib.Path:
    """Writes the checkpoint folder `source` (config.json and safetensors) as a model of the zoo into `out`.

    One shard is in memory at a time. `out` appears only when it is complete.

    Raises:
        RnnzooError: unknown architecture, missing or foreign files, or `out` exists and is not empty.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    if architecture not in importable():
        raise RnnzooError(f"'{architecture}' has no importer; there is one for {', '.join(importable())}.")
    if not (source / "config.json").is_file():
        raise RnnzooError(f"{source} holds no config.json; give the folder of a checkpoint.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RnnzooError(f"{out} already exists and is not empty; choose another folder.")
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise RnnzooError(f"{source} holds no *.safetensors; save the checkpoint in that format first.")
    rules = importlib.import_module(f"...{architecture}.importing_{architecture}", __name__)
    config = rules.convert_config(json.loads((source / "config.json").read_text(encoding="utf-8")))
    config.architectures = [f"{config_class(architecture).__name__.removesuffix('Config')}ForCausalLM"]

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = pathlib.Path(scratch) / "model"
        folder.mkdir()
        _write_shards(shards, folder, rules.rename, config.tie_word_embeddings)
        config.save_pretrained(folder)
        for pattern in COPIED:
            for file in source.glob(pattern):
                shutil.copy2(file, folder)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    return out


def _write_shards(shards: list[pathlib.Path], folder: pathlib.Path, rename, tied: bool) -> None:
    where: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        try:
            with safetensors.safe_open(shard, "pt") as file:
                tensors = {rename(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dictionary
        except safetensors.SafetensorError as error:
            raise RnnzooError(f"{shard} is not a readable safetensors file: {error}") from error
        if tied:
            tensors.pop("lm_head.weight", None)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
