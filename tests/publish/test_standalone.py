"""A published model loads, generates and trains where rnnzoo is not installed, from one readable file of its own, and
with a second one its kernels in C."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from rnnzoo import __version__
from rnnzoo.kernels import native, sources
from rnnzoo.kernels.cache import cache_root
from rnnzoo.kernels.dispatch import use_backend
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.publish.compiled_source import compiled_operations
from rnnzoo.publish.modules import COMPILED_FILE
from rnnzoo.publish.standalone import CODE_FILE, LINE_LIMIT, standalone_code, standalone_files
from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.registry import architectures
from rnnzoo.zoo.core.sizes import architecture_config, causal_lm_class

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61}
WINDOW = {"window_size": 5, "num_sinks": 2, "sliding_window": 6}
# Beside every architecture by itself: hybrids with attention, and options that leave other parts of the code in use.
VARIANTS: dict[str, tuple[str, dict]] = {
    "mamba2-hybrid": ("mamba2", {"layer_types": ["mamba2", "full_attention", "sliding_attention"]}),
    "hedgehog-hybrid": ("hedgehog", {"layer_types": ["hedgehog", "full_attention", "sliding_attention"]} | WINDOW),
    "hedgehog-packed": ("hedgehog", WINDOW | {"feature_map": "prototype", "feature_width": 4, "ring_bits": [8, 4]}),
    "hedgehog-long": ("hedgehog", WINDOW | {"window_sizes": [[3, 7], [70, 2]], "sink_distance": 9, "head_dim": 16}),
    "hedgehog-packed-hybrid": (
        "hedgehog",
        WINDOW | {"feature_map": "prototype", "feature_width": 4, "ring_bits": [8, 4], "num_hidden_layers": 3},
    ),
    "liger-hybrid": (
        "liger",
        {"layer_types": ["liger", "full_attention", "sliding_attention"], "num_hidden_layers": 3},
    ),
    "hedgehog-widths": (
        "hedgehog",
        WINDOW | {"feature_map": "prototype", "feature_widths": [0, 3], "ring_bits": [8, 4]},
    ),
    "gla-bare": ("gla", {"norm_type": "layer", "logit_cap": 5.0, "embedding_scale": 2.0, "qk_norm": True}),
}
VARIANTS["hedgehog-packed-hybrid"][1].update(layer_types=["hedgehog", "full_attention", "sliding_attention"])
VARIANTS["liger-hybrid"][1].update(sliding_window=6)
VARIANTS["mamba2-hybrid"][1].update(sliding_window=6, num_hidden_layers=3)
VARIANTS["hedgehog-hybrid"][1].update(num_hidden_layers=3)
VARIANTS["hedgehog-long"][1].update(num_attention_heads=2)
NAMES = (*architectures(), *VARIANTS)
SAVED_AGAIN = ("mamba2-hybrid", "hedgehog-hybrid", "transformer")
NOT_CALLED = {"hgrn": {"short_conv"}}  # off by default
WITHOUT_COMPILER = ("gla", "mamba2-hybrid", "rwkv4", "rwkv7", "hedgehog-packed", "liger")


def config_of(name: str) -> RecurrentConfig:
    architecture, fields = VARIANTS.get(name, (name, {}))
    cls: Any = architecture_config(architecture)
    return cls(**(SIZES | fields))


def calls() -> dict[str, dict]:
    """Arguments of calls: plain, with padding on either side, and with packed documents."""
    ids = torch.randint(0, 61, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, 60:] = 0
    documents = torch.tensor([[0] * 8 + [1] * 30 + [2] * 32, [0] * 69 + [1]])
    return {
        "plain": {"input_ids": ids},
        "padded": {"input_ids": ids, "attention_mask": mask},
        "packed": {"input_ids": ids, "seq_ids": documents},
    }


def write_model(folder: Path, name: str) -> None:
    """A tiny model with its code, and what rnnzoo makes of some tokens with it."""
    torch.manual_seed(0)
    config = config_of(name)
    model = causal_lm_class(config.mixer)(config).eval()
    with torch.no_grad():  # what starts at zero would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    for file, content in standalone_files(folder).items():
        (folder / file).write_bytes(content)
    with use_backend("chunked"), torch.no_grad():
        logits = {kind: model(**call).logits for kind, call in calls().items()}
        ids = calls()["plain"]["input_ids"]
        loss = model(ids, labels=ids).loss.item()
        tokens = model.generate(ids[:, :12], max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    expected = {"calls": calls(), "logits": logits, "loss": loss, "tokens": tokens}
    torch.save(expected, folder / "expected.pt")
    if name in SAVED_AGAIN:
        (folder / "again").touch()


def strangers(root: Path, *arguments: str, **environment: str) -> dict:
    """What a process without rnnzoo makes of the models in a folder."""
    script = Path(__file__).with_name("without_rnnzoo.py")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("RNNZOO", "PYTHONPATH"))}
    variables |= {"HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-I", str(script), str(root), *arguments]
    done = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "outcome.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for name in NAMES:
        write_model(root / "models" / name, name)
    return root


@pytest.fixture(scope="module")
def outcome(root) -> dict:
    # The same C code makes the same libraries, which other tests have built.
    found = strangers(root, RNNZOO_CACHE=str(cache_root()))
    assert not found["rnnzoo"]
    return found["models"]


def folders_in_c(folder: Path) -> set[str]:
    """Folders of the kernels whose C code comes with a model."""
    path = folder / COMPILED_FILE
    operations = re.findall(r'^COMPILED\["(\w+)"\]', path.read_text() if path.is_file() else "", re.MULTILINE)
    return {compiled_operations()[operation][0].module.split(".")[1] for operation in operations}


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_gets_the_same_model(outcome, root, name):
    seen = outcome[name]
    assert "error" not in seen, seen["error"]
    assert seen["module"].startswith("transformers_modules.") and seen["class"].endswith("ForCausalLM")
    differences = {kind: seen[kind] for kind in calls()}
    assert max(differences.values()) < 2e-5, differences
    assert len(seen["tokens"][0]) == 20 and seen["tokens_differ"] == 0 and seen["cache_changes_nothing"]
    assert seen["loss"] < 1e-5 and seen["learns"]
    expected = folders_in_c(root / "models" / name) - NOT_CALLED.get(name, set())
    assert set(seen["compiled"]) == (expected if native.compiler() else set())


def test_without_a_compiler_the_models_own_code_serves(root, tmp_path):
    for name in WITHOUT_COMPILER:
        shutil.copytree(root / "models" / name, tmp_path / "models" / name, ignore=shutil.ignore_patterns("again"))
    found = strangers(tmp_path, PATH=str(tmp_path / "nothing"), CC="", RNNZOO_CACHE=str(tmp_path / "cache"))
    for name in WITHOUT_COMPILER:
        seen = found["models"][name]
        assert "error" not in seen, seen["error"]
        assert seen["compiled"] == [] and max(seen[kind] for kind in calls()) < 2e-5
        assert seen["tokens_differ"] == 0 and seen["loss"] < 1e-5 and seen["learns"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", SAVED_AGAIN)
def test_it_takes_its_code_along_when_it_is_saved(outcome, name):
    seen = outcome[name]
    assert seen["same"] and seen["classes"] == [2, 3]
    assert {CODE_FILE, "config.json", "model.safetensors"} <= set(seen["files"])


def test_assisted_decoding_is_refused_in_words(outcome):
    assert "assisted" in outcome["transformer"]["assisted"].lower()


@pytest.mark.parametrize("name", NAMES)
def test_the_code_is_one_short_file_that_imports_only_torch_and_transformers(root, name):
    path = root / "models" / name / CODE_FILE
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= LINE_LIMIT
    assert max(map(len, lines)) <= 120
    assert "SPDX-License-Identifier: Apache-2.0" in lines[0] and f"rnnzoo {__version__}" in text[:1000]
    others = [COMPILED_FILE.removesuffix(".py")] if folders_in_c(path.parent) else []
    assert get_relative_imports(path) == others
    assert path.with_name(COMPILED_FILE).is_file() == bool(others)
    packages = {package.partition(".")[0] for package in get_imports(path)} - set(sys.stdlib_module_names)
    assert packages <= {"torch", "transformers", "huggingface_hub"}
    tree = ast.parse(text)
    relative = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert relative == others
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(names) == len(set(names))


def test_only_what_the_configuration_needs_is_in_it():
    plain, hybrid = standalone_code(config_of("mamba2")), standalone_code(config_of("mamba2-hybrid"))
    assert "class FullAttention" not in plain and "class SlidingAttention" in hybrid
    for text in ("def init_from_attention", "class WindowState", "def crop", "linear_kl", "class Perspectives"):
        assert text not in plain, text


@pytest.mark.parametrize("name", ["mamba2", "rwkv7", "griffin"])
def test_the_c_code_of_its_kernels_is_there_as_it_stands(root, name):
    text = (root / "models" / name / COMPILED_FILE).read_text()
    assert "SPDX-License-Identifier: Apache-2.0" in text and f"rnnzoo {__version__}" in text[:1000]
    packages = {package.partition(".")[0] for package in get_imports(root / "models" / name / COMPILED_FILE)}
    assert packages - set(sys.stdlib_module_names) <= {"torch"}
    for folder in folders_in_c(root / "models" / name):
        assert (sources.c_sources() / folder / "cpu.c").read_text() in text
    assert all(path.read_text() in text for path in sources.c_sources().glob("*.h"))


def test_the_same_configuration_gives_the_same_file():
    assert standalone_code(config_of("gla")) == standalone_code(config_of("gla"))


def test_the_tokenizer_loads_without_trusting_code(root):
    """transformers' base class, which then reads config.json, knows no layer types of ours."""
    assert "layer_types" not in json.loads((root / "models" / "mamba2" / "config.json").read_text())
    assert "layer_types" in json.loads((root / "models" / "mamba2-hybrid" / "config.json").read_text())


def test_a_folder_that_is_no_model_of_the_zoo_is_refused(tmp_path):
    with pytest.raises(RnnzooError, match="no folder"):
        standalone_files(tmp_path / "none")
    with pytest.raises(RnnzooError, match=r"no config\.json"):
        standalone_files(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RnnzooError, match="'llama', which is no model of rnnzoo"):
        standalone_files(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RnnzooError, match="not readable as JSON"):
        standalone_files(tmp_path)


@pytest.mark.slow
def test_nothing_but_torch_and_transformers_is_needed(tmp_path):
    for name in ("mamba2", "hedgehog-hybrid"):
        write_model(tmp_path / "models" / name, name)
    found = strangers(tmp_path, "fresh")
    assert {"rnnzoo", "click", "pytest", "accelerate"} - set(found["blocked"]) <= {
        "click"
    }  # the Hub's own command uses click
    for name, seen in found["models"].items():
        assert "error" not in seen, seen["error"]
        assert seen["plain"] < 2e-5 and seen["learns"], name
