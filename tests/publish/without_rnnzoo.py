"""Run in a process of its own: uses models with their own code, where rnnzoo cannot be imported.

python without_rnnzoo.py ROOT         every folder of ROOT is a model with expected.pt; writes ROOT/outcome.json
python without_rnnzoo.py ROOT fresh   the same, where nothing but torch, transformers and what they need is found
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any


def unneeded() -> set[str]:
    """Top-level modules of every installed package that torch, transformers and safetensors do not require."""
    needed, waiting = set(), ["torch", "transformers", "safetensors"]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in needed:
            continue
        needed.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [re.split(r"[^\w.-]", line)[0] for line in requirements if "extra ==" not in line]
    owners = metadata.packages_distributions()
    return {
        module
        for module, packages in owners.items()
        if not {re.sub(r"[-_.]+", "-", package).lower() for package in packages} & needed
    }


class Without:
    """A finder that does not find some packages, as if they were not installed."""

    def __init__(self, finder, names: set[str]):
        self.finder, self.names = finder, names

    def find_spec(self, name: str, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str):
        return getattr(self.finder, name)


def outcome(folder: Path) -> dict:
    """What a stranger sees of one model."""
    import torch
    from transformers import AutoModelForCausalLM

    expected = torch.load(folder / "expected.pt", weights_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    package = type(model).__module__.rpartition(".")[0]
    seen: dict = {"module": type(model).__module__, "class": type(model).__name__}
    with torch.no_grad():
        for name, call in expected["calls"].items():
            seen[name] = (model(**call).logits - expected["logits"][name]).abs().max().item()
        seen |= generated(model, expected, sys.modules[f"{package}.kernels_tape"])
        seen["rolled_back"] = rolled_back(model, expected["calls"]["plain"]["input_ids"])
    seen |= trained(model, expected)
    seen["compiled"] = sorted(sys.modules[f"{package}.kernels_native"]._libraries)
    seen["triton"] = f"{package}.kernels_gated_linear_attention_triton_" in sys.modules
    return seen


def generated(model, expected: dict, tape) -> dict:
    """Whether tokens are those of rnnzoo, with a cache, without one and by prompt lookup; and how much is replayed."""
    ids = expected["calls"]["plain"]["input_ids"][:, :12]
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    replay, replays = tape.Tape.replay, []
    tape.Tape.replay = lambda self: (replays.append(self), replay(self))[1]
    tokens = model.generate(ids, **greedy).tolist()
    tape.Tape.replay = replay
    looked_up = model.generate(ids[:1], prompt_lookup_num_tokens=2, **greedy).tolist()
    return {
        "tokens": tokens == expected["tokens"],
        "cache_changes_nothing": model.generate(ids, use_cache=False, **greedy).tolist() == tokens,
        "looked_up": looked_up == tokens[:1],
        "replays": len(replays),
    }


def rolled_back(model, ids) -> float:
    """Difference in the logits of two tokens, read again after they and others were taken back, one was not."""
    cache = model(ids[:, :9], use_cache=True)
    cache = cache["cache" if "cache" in cache else "past_key_values"]
    cache.activate_past_recording()
    first = model(ids[:, 9:12], past_key_values=cache).logits[:, 1:]
    model(ids[:, 12:16], past_key_values=cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 10
    return (model(ids[:, 10:12], past_key_values=cache).logits - first).abs().max().item()


def trained(model, expected: dict) -> dict:
    """One training step with checkpointing, and what it did."""
    import torch

    ids = expected["calls"]["plain"]["input_ids"]
    model.train()
    model.activation_checkpointing_enable()
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"loss": abs(losses[0] - expected["loss"]), "learns": losses[1] < losses[0]}


def again(folder: Path) -> dict:
    """Saved, loaded again, and with the other heads."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    copy = folder.parent.parent / "saved" / folder.name
    model.save_pretrained(copy)
    classifier = AutoModelForSequenceClassification.from_pretrained(copy, trust_remote_code=True, num_labels=3)
    base = AutoModel.from_pretrained(copy, trust_remote_code=True)
    ids = torch.load(folder / "expected.pt", weights_only=True)["calls"]["plain"]["input_ids"]
    with torch.no_grad():
        same = torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    shape = list(classifier(ids, attention_mask=torch.ones_like(ids)).logits.shape)
    return {"same": same, "classes": shape, "files": sorted(p.name for p in copy.iterdir())}


def main(root: Path, fresh: bool) -> None:
    blocked = {"rnnzoo"} | (unneeded() if fresh else set())
    sys.meta_path[:] = [Without(finder, blocked) for finder in sys.meta_path]
    import torch

    torch.set_num_threads(1)
    results: dict[str, dict] = {}
    for folder in sorted((root / "models").iterdir()):
        try:
            results[folder.name] = outcome(folder)
            if (folder / "again").exists():
                results[folder.name] |= again(folder)
        except Exception:
            results[folder.name] = {"error": traceback.format_exc()}
    (root / "outcome.json").write_text(
        json.dumps({"models": results, "blocked": sorted(blocked), "rnnzoo": "rnnzoo" in sys.modules})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["fresh"])
