"""The authors' own inference package on CPU, in a process of its own: it reads its settings when it is imported."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch
import transformers

from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.core.registry import config_class

SCRIPT = """
import sys, torch
from rwkv.model import RWKV
folder = sys.argv[1]
torch.set_num_threads(1)
ids = torch.load(f"{folder}/ids.pt").tolist()
model = RWKV(model=f"{folder}/model", strategy="cpu fp32")
whole, state = model.forward(ids[:-3], None, full_output=True)
steps = []
for token in ids[-3:]:
    one, state = model.forward([token], state)
    steps.append(one)
torch.save(torch.cat([whole, torch.stack(steps)]), f"{folder}/logits.pt")
"""


@torch.no_grad()
def logits_of_the_package(folder: pathlib.Path, ids: torch.Tensor, version: int) -> torch.Tensor:
    """(T, vocab): of `folder`/model.pth for ids (T,), all but the last three tokens at once."""
    pytest.importorskip("rwkv")
    torch.save(ids, folder / "ids.pt")
    settings = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(version == 7))}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt")


@torch.no_grad()
def ours_and_theirs(architecture: str, folder: pathlib.Path, **fields) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of random weights, every tensor far from its start: by a model of ours that went through the package's
    format, and by the package."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 3}
    model = transformers.AutoModelForCausalLM.from_config(config_class(architecture)(**(sizes | fields)))
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder / "model")
    export_checkpoint(folder / "model", "rwkv", folder / "theirs")
    import_checkpoint(folder / "theirs" / "model.pth", architecture, folder / "back")
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder / "back").eval()
    ids = torch.randint(0, 61, (40,))
    return ours(ids[None]).logits[0], logits_of_the_package(folder / "theirs", ids, int(architecture[-1]))


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To 1e-4 of the logits' size."""
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
