"""Memory that `rnnzoo convert --offload` takes for a teacher of Llama 3.2 3B's sizes: random weights, built on disk.

    python scripts/measure_offload.py FOLDER [--layers 28] [--tokens 512] [--seq-len 256]

Takes 22 GB of disk in FOLDER at most: the teacher, which stays there for the next call, the mixers on the way and the
converted model. Calibration reads as many tokens as alignment.
Prints one line of JSON: sizes on disk, peak resident memory in all and without the mapped files, seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rnnzoo.conversions.evaluation.recall import filler_text
from rnnzoo.conversions.recipes.load import load_recipe

SIZES = dict(
    hidden_size=3072, intermediate_size=8192, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
    vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def build_teacher(folder: Path, layers: int) -> None:
    """Shards of bfloat16, a layer each, never more than one of them in memory."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"], **SIZES)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.named_parameters():
        part = name.split(".")[2] if ".layers." in name else "ends"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    where, size = {}, 0
    for file, shapes in shards.items():
        tensors = {}
        for name, shape in shapes.items():
            norm = len(shape) == 1
            drawn = torch.ones(shape) if norm else torch.randn(shape, generator=generator).mul_(0.02)
            tensors[name] = drawn.bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        size += sum(tensor.numel() * 2 for tensor in tensors.values())
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tokenizer() -> PreTrainedTokenizerFast:
    symbols = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>")


class Watch(threading.Thread):
    """Peak resident memory of a process: in all, and what is its own."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.status, self.peak, self.own = Path(f"/proc/{pid}/status"), 0, 0

    def run(self) -> None:
        while True:
            try:
                lines = dict(line.split(":", 1) for line in self.status.read_text().splitlines())
                values = {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}
            except (OSError, KeyError, ValueError):
                return
            self.peak, self.own = max(self.peak, values["VmRSS"]), max(self.own, values["RssAnon"])
            time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=256)
    own = parser.parse_args()
    teacher, data, out = own.folder / f"teacher-{own.layers}", own.folder / "text.jsonl", own.folder / "student"
    build_teacher(teacher, own.layers)
    data.write_text("".join(json.dumps({"text": filler_text(15, seed)}) + "\n" for seed in range(200)))
    recipe = own.folder / "layerwise.yaml"
    recipe.write_text(yaml.safe_dump(load_recipe("layerwise").to_dict() | {"calibration_tokens": own.tokens}))
    command = [sys.executable, "-m", "rnnzoo", "convert", str(teacher), "--recipe", str(recipe), "--offload"]
    command += ["--data", str(data), "--out", str(out), "--tokens", str(own.tokens), "--seq-len", str(own.seq_len)]
    command += ["--batch-tokens", str(own.seq_len), "--restart", "--json", "--quiet"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    watch = Watch(process.pid)
    watch.start()
    results = json.loads(process.communicate()[0] or "{}")
    if process.returncode:
        sys.exit(process.returncode)
    size = sum(file.stat().st_size for file in teacher.glob("*.safetensors"))
    stages = {stage["name"]: stage.get("seconds") for stage in results["conversion"]["stages"]}
    found = {"teacher_bytes": size, "parameters": results["teacher"]["parameters"]}
    found |= {"peak_bytes": watch.peak, "peak_bytes_without_mapped_files": watch.own}
    found |= {"machine_bytes": psutil.virtual_memory().total, "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(found | {"stages": stages}))


if __name__ == "__main__":
    main()
