"""A published model loads, generates and trains where rnnzoo is not installed, by the code of rnnzoo itself."""

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
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from rnnzoo import __version__
from rnnzoo.kernels import native
from rnnzoo.kernels.cache import cache_root
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.kernels.sources import c_sources
from rnnzoo.kernels.tape import Tape
from rnnzoo.publish.standalone import CODE_FILE, standalone_code, standalone_files
from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.registry import architectures
from rnnzoo.zoo.core.sizes import architecture_config, causal_lm_class

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "sliding_window": 6}
WINDOW = {"window_size": 5, "num_sinks": 2}
PACKED = WINDOW | {"feature_map": "prototype", "feature_width": 4, "ring_bits": [8, 4]}
ATTENTION = ["full_attention", "sliding_attention"]
EVERYTHING = [*architectures(), *ATTENTION]
# Beside every architecture by itself: hybrids, the first of a layer of each, and options.
VARIANTS: dict[str, tuple[str, dict]] = {
    "everything": ("transformer", {"layer_types": EVERYTHING, "num_hidden_layers": len(EVERYTHING)}),
    "mamba2-hybrid": ("mamba2", {"layer_types": ["mamba2", *ATTENTION], "num_hidden_layers": 3}),
    "hedgehog-packed": ("hedgehog", PACKED),
    "hedgehog-long": ("hedgehog", WINDOW | {"window_sizes": [[3, 7], [70, 2]], "sink_distance": 9, "head_dim": 16}),
    "gla-bare": ("gla", {"norm_type": "layer", "logit_cap": 5.0, "embedding_scale": 2.0, "qk_norm": True}),
}
VARIANTS["hedgehog-long"][1].update(num_attention_heads=2)
NAMES = (*architectures(), *VARIANTS)
# Those of which the default run makes models: every architecture is in the first, every kind of part in the others.
LOADED = ("everything", "mamba2-hybrid", "hedgehog-packed", "gla-bare", "rwkv4", "rwkv7", "griffin", "transformer")
SAVED_AGAIN = ("mamba2-hybrid", "transformer")
WITHOUT_COMPILER = ("everything",)


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
    model: Any = causal_lm_class(name if name in architectures() else VARIANTS[name][0])(config).eval()
    with torch.no_grad():  # what starts at zero would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    for file, content in standalone_files(folder).items():
        (folder / file).write_bytes(content)
    replay, replays = Tape.replay, []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tape, "replay", lambda self: (replays.append(self), replay(self))[1])
        logits = {kind: model(**call).logits for kind, call in calls().items()}
        ids = calls()["plain"]["input_ids"]
        loss = model(ids, labels=ids).loss.item()
        tokens = model.generate(ids[:, :12], max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    expected = {"calls": calls(), "logits": logits, "loss": loss, "tokens": tokens, "replays": len(replays)}
    torch.save(expected, folder / "expected.pt")
    if name in SAVED_AGAIN:
        (folder / "again").touch()


def in_another_process(script: str | Path, root: Path, *arguments: str, **environment: str) -> None:
    """Runs Python without the checkout in its path; what is fetched and cached goes into `root`."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("RNNZOO", "PYTHONPATH"))}
    variables |= {"HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *(["-I", str(script)] if isinstance(script, Path) else ["-P", "-c", script])]
    done = subprocess.run([*command, str(root), *arguments], env=variables, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def strangers(root: Path, *arguments: str, **environment: str) -> dict:
    """What a process without rnnzoo makes of the models in a folder."""
    in_another_process(Path(__file__).with_name("without_rnnzoo.py"), root, *arguments, **environment)
    return json.loads((root / "outcome.json").read_text())


def expect_the_same_model(seen: dict, folder: Path) -> None:
    assert "error" not in seen, seen["error"]
    assert seen["module"].startswith("transformers_modules.") and seen["class"].endswith("ForCausalLM")
    differences = {kind: seen[kind] for kind in calls()}
    assert max(differences.values()) < 2e-5, differences
    assert seen["tokens"] and seen["cache_changes_nothing"] and seen["looked_up"]
    assert seen["rolled_back"] < 2e-5
    assert seen["loss"] < 1e-5 and seen["learns"]
    assert seen["replays"] == torch.load(folder / "expected.pt")["replays"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for name in LOADED:
        write_model(root / "models" / name, name)
    return root


@pytest.fixture(scope="module")
def outcome(root) -> dict:
    # The same C code makes the same libraries, which other tests have built.
    found = strangers(root, RNNZOO_CACHE=str(cache_root()))
    assert not found["rnnzoo"]
    return found["models"]


@pytest.mark.parametrize("name", LOADED)
def test_a_stranger_gets_the_same_model(outcome, root, name):
    expect_the_same_model(outcome[name], root / "models" / name)


def test_a_copy_decodes_by_tapes_and_compiles_its_kernels(outcome):
    if native.compiler() is None:
        pytest.skip("no C compiler")
    assert all(outcome[name]["replays"] > 0 for name in LOADED)
    folders = {name.partition("/")[0] for name in c_sources() if name.endswith("/cpu.c")}
    assert set(outcome["everything"]["compiled"]) == folders
    assert "selective_scan" not in outcome["gla-bare"]["compiled"]


def test_without_a_compiler_other_kernels_serve(root, tmp_path):
    for name in WITHOUT_COMPILER:
        shutil.copytree(root / "models" / name, tmp_path / "models" / name)
    found = strangers(tmp_path, PATH=str(tmp_path / "nothing"), CC="", RNNZOO_CACHE=str(tmp_path / "cache"))
    for name in WITHOUT_COMPILER:
        seen = found["models"][name]
        assert "error" not in seen, seen["error"]
        assert seen["compiled"] == [] and seen["replays"] == 0 and max(seen[kind] for kind in calls()) < 2e-5
        assert seen["tokens"] and seen["rolled_back"] < 2e-5 and seen["loss"] < 1e-5 and seen["learns"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_triton_kernels_come_along(tmp_path):
    for name in ("gla-bare", "mamba2-hybrid"):
        write_model(tmp_path / "models" / name, name)
    found = strangers(tmp_path, RNNZOO_CACHE=str(cache_root()), RNNZOO_BACKEND="triton", TRITON_INTERPRET="1")["models"]
    for name, seen in found.items():
        assert "error" not in seen, seen["error"]
        assert seen["triton"] and seen["replays"] == 0 and max(seen[kind] for kind in calls()) < 2e-5, name
        assert seen["tokens"] and seen["loss"] < 1e-5 and seen["learns"]


@pytest.mark.slow
def test_every_architecture_loads_by_itself(tmp_path):
    for name in NAMES:
        write_model(tmp_path / "models" / name, name)
    found = strangers(tmp_path, RNNZOO_CACHE=str(cache_root()))["models"]
    assert set(found) == set(NAMES)
    for name, seen in found.items():
        expect_the_same_model(seen, tmp_path / "models" / name)


@pytest.mark.parametrize("name", SAVED_AGAIN)
def test_it_takes_its_code_along_when_it_is_saved(outcome, root, name):
    seen = outcome[name]
    assert seen["same"] and seen["classes"] == [2, 3]
    code = {path.name for path in (root / "models" / name).glob("*.py")}
    assert {*code, "config.json", "model.safetensors"} <= set(seen["files"])


@pytest.mark.parametrize("name", NAMES)
def test_transformers_finds_every_file(name, tmp_path):
    code = standalone_code(config_of(name))
    for file, text in code.items():
        (tmp_path / file).write_text(text)
    named = {Path(file).name for file in get_relative_import_files(tmp_path / CODE_FILE)}
    assert named | {CODE_FILE} == set(code)


def test_transformers_asks_for_no_package_but_itself_and_torch(root):
    files = list((root / "models" / "everything").glob("*.py"))
    packages = {package for file in files for package in get_imports(file)}
    assert len(files) > 100 and packages - set(sys.stdlib_module_names) == {"torch", "transformers", "huggingface_hub"}


def without_imports(text: str) -> str:
    """Code without docstrings' and comments' whitespace, and without imports, at any place."""

    class Remove(ast.NodeTransformer):
        def visit_Import(self, node):
            return None

        visit_ImportFrom = visit_Import

        def visit_Try(self, node):
            self.generic_visit(node)
            return node if node.body else None

    return ast.unparse(Remove().visit(ast.parse(text)))


def test_the_code_is_that_of_rnnzoo_but_for_its_imports():
    package = Path(sys.modules["rnnzoo"].__file__ or "").parent
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.glob("*/**/*.py")}
    paths = {name.removesuffix(".__init__").replace(".", "_") + ".py": path for name, path in paths.items()}
    code = standalone_code(config_of("everything"))
    written_anew = {CODE_FILE, "kernels_sources.py", "zoo_core_folders.py"}
    assert len(code) > 100 and written_anew <= set(code)
    for file, text in code.items():
        lines = text.splitlines()
        assert lines[0] == "# SPDX-License-Identifier: Apache-2.0" and f"rnnzoo {__version__}" in lines[2]
        if file not in written_anew:
            own = paths[file].read_text()
            assert without_imports(text) == without_imports(own), file
            assert text.count("#") == own.count("#") + 3
            # What a copy in another package could not do, or not twice.
            assert not re.search(r"__file__|import_module\(.*__(name|package)__|\"rnnzoo::", text), file


def test_only_what_the_model_is_made_of_comes_along():
    code = standalone_code(config_of("mamba2-hybrid"))
    names = "zoo_mamba2_modeling_mamba2.py", "kernels_tape.py", "kernels_short_conv_cpu.py", "zoo_core_attention.py"
    assert set(names) <= set(code)
    assert not [name for name in code if "hedgehog" in name or "importing" in name or "sizes" in name]
    texts: dict = {}
    exec(code["kernels_sources.py"], texts)
    assert {"vec.h", "short_conv/cpu.c", "tape/cpu.c"} <= set(texts["c_sources"]())
    assert texts["c_sources"]().items() <= c_sources().items()


def test_the_same_configuration_gives_the_same_code():
    assert standalone_code(config_of("gla")) == standalone_code(config_of("gla"))


def test_the_tokenizer_loads_without_trusting_code(root):
    """transformers' base class, which then reads config.json, knows no layer types of ours."""
    assert "layer_types" not in json.loads((root / "models" / "gla-bare" / "config.json").read_text())
    assert "layer_types" in json.loads((root / "models" / "mamba2-hybrid" / "config.json").read_text())


SEVERAL = """
import sys, torch
from pathlib import Path
from transformers import configuration_utils
from transformers.dynamic_module_utils import get_class_from_dynamic_module as find

torch.set_num_threads(1)
root = Path(sys.argv[1])
ids = torch.arange(40)[None] % 61


def results(model):
    loss = model(ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    grown = model.generate(ids[:, :9], max_new_tokens=6, do_sample=False, pad_token_id=0)
    return [loss, *(p.grad.clone() for p in model.parameters()), grown]


def load(folder):
    return find("modeling_rnnzoo.GLAForCausalLM", folder).from_pretrained(folder)


models = [load(root / name) for name in ("old/model", "new/model", "same")]
before = [results(model) for model in models]
find("modeling_rnnzoo.Mamba2Config", root / "other")
assert all(kind in configuration_utils.ALLOWED_ATTN_LAYER_TYPES for kind in ("gla", "mamba2"))
import rnnzoo
from rnnzoo.kernels import operators
from rnnzoo.zoo.gla.modeling_gla import GLAForCausalLM

models.append(GLAForCausalLM.from_pretrained(root / "same"))
models.append(load(root / "old/model"))
after = [results(model) for model in models]
for result in [*before, *after]:
    assert all(map(torch.equal, result, after[0]))
places = [type(model).__module__.rpartition(".")[0] for model in models]
assert len(set(places)) == 4 and places[0] == places[-1] and places[3] == "rnnzoo.zoo.gla"
names = {sys.modules[f"{place}.kernels_operators"].NAMESPACE for place in places if "rnnzoo" not in place}
assert len(names) == 3 and operators.NAMESPACE == "rnnzoo"
for name in {"rnnzoo", *names}:
    assert hasattr(getattr(torch.ops, name), "gated_linear_attention_cpu")
"""


def test_copies_of_two_versions_the_same_copy_twice_and_rnnzoo_live_in_one_process(tmp_path):
    write_model(tmp_path / "same", "gla")
    write_model(tmp_path / "other", "mamba2")
    for name in ("old", "new"):
        shutil.copytree(tmp_path / "same", tmp_path / name / "model")
    for path in (tmp_path / "new" / "model").glob("*.py"):
        path.write_text(path.read_text().replace(f"rnnzoo {__version__}", "rnnzoo 99.0.0"))
    source = str(Path(sys.modules["rnnzoo"].__file__ or "").parents[1])
    in_another_process(SEVERAL, tmp_path, RNNZOO_CACHE=str(cache_root()), PYTHONPATH=source, RNNZOO_NO_REGISTER="1")


def test_a_folder_that_is_no_model_of_the_zoo_is_refused(tmp_path):
    with pytest.raises(RnnzooError, match="no folder"):
        standalone_files(tmp_path / "none")
    with pytest.raises(RnnzooError, match=r"no config\.json"):
        standalone_files(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RnnzooError, match="'llama', which is no model of rnnzoo"):
        standalone_files(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RnnzooError, match="not readable JSON"):
        standalone_files(tmp_path)


@pytest.mark.slow
def test_nothing_but_torch_and_transformers_is_needed(tmp_path):
    for name in ("mamba2", "hedgehog-packed"):
        write_model(tmp_path / "models" / name, name)
    found = strangers(tmp_path, "fresh")
    assert {"rnnzoo", "click", "pytest", "accelerate"} - set(found["blocked"]) <= {
        "click"
    }  # the Hub's own command uses click
    for name, seen in found["models"].items():
        expect_the_same_model(seen, tmp_path / "models" / name)
