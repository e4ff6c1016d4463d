"""A model's code as it is in rnnzoo, beside the model: its modules, and all that they import, in one flat folder.

transformers copies the code of a model from one folder, by the relative imports of one file. Module `zoo.core.cache`
therefore becomes `zoo_core_cache.py`, and nothing in it is rewritten but imports. Two modules, which look into folders
that a copy does not have, are written anew: `kernels.sources` with the texts of the C code, and `zoo.core.folders` with
the names of the architectures that come along.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..kernels.errors import RnnzooError
from ..kernels.files import read_object
from ..kernels.sources import c_sources
from ..zoo.core.folders import architectures

if TYPE_CHECKING:
    from ..zoo.core.configuration import RecurrentConfig

__all__ = ["CODE_FILE", "auto_map", "load_config", "standalone_code", "standalone_files"]

CODE_FILE = "modeling_rnnzoo.py"
"""The file that names the classes and all other files."""

ROOT = Path(__file__).resolve().parent.parent
C_SOURCES, FOLDERS = "kernels.sources", "zoo.core.folders"
HEADS = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
HEADS |= {"AutoModelForSequenceClassification": "ForSequenceClassification"}
# transformers refuses code with imports of what is not installed, but for imports in a `try`.
INSTALLED = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}

HEADER = f"""\
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0. Provided "as is".
# rnnzoo {__version__}: %s

"""
ENTRY = '''\
"""The model of this folder. It needs torch, transformers and safetensors; a C compiler or triton makes it faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .{configuration} import {config}
from .{modeling} import {models}

# Saving a model takes along what the module of its class imports.
for _class in ({config}, {models}):
    _class.__module__ = __name__

if TYPE_CHECKING:  # transformers takes along what is imported in this form
{imports}
'''
FOLDERS_CODE = '''\
"""The architectures that came along with this model, and their modules by name."""

from __future__ import annotations

import importlib
from types import ModuleType


def architectures() -> tuple[str, ...]:
    return {names!r}


def architecture_module(name: str, what: str) -> ModuleType:
    return importlib.import_module(f".zoo_{{name}}_{{what}}_{{name}}", __package__)
'''
C_SOURCES_CODE = '''\
"""The C code of the kernels, as it stands in rnnzoo."""

from __future__ import annotations

TEXTS: dict[str, str] = {{}}


def c_sources() -> dict[str, str]:
    return TEXTS
{texts}'''


def standalone_files(folder: str | Path) -> dict[str, bytes]:
    """What makes the model in a folder load without rnnzoo: its code, and config.json with its `auto_map`, by name.

    Raises:
        RnnzooError: no folder, or no model of rnnzoo in it.
    """
    config = load_config(folder)
    written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    written["auto_map"] = auto_map(config)
    # Where the tokenizer alone is loaded and no code is trusted, transformers' base class reads this file, and refuses
    # layer types that it does not know. Those of a model of one kind follow from its model_type.
    if set(config.layer_types or []) == {config.mixer}:
        written.pop("layer_types", None)
    text = json.dumps(written, indent=2, sort_keys=True) + "\n"
    return {"config.json": text.encode(), **{name: code.encode() for name, code in standalone_code(config).items()}}


def load_config(folder: str | Path) -> RecurrentConfig:
    """The configuration of the model in a folder; no code of the folder is run.

    Raises:
        RnnzooError: no folder, or no model of rnnzoo in it.
    """
    from ..zoo.core.sizes import architecture_config

    path = Path(folder) / "config.json"
    if not path.is_file():
        what = "holds no model (no config.json)" if Path(folder).is_dir() else "is no folder"
        raise RnnzooError(f"{folder} {what}; give the output folder of rnnzoo convert, train or import.")
    kind = read_object(path, "save the model again").get("model_type")
    name = str(kind).removeprefix("rnnzoo-")
    if name == kind or name not in architectures():
        raise RnnzooError(f"{folder} has model_type {kind!r}, which is no model of rnnzoo; its code cannot be written.")
    try:
        return architecture_config(name).from_pretrained(folder)
    except Exception as error:
        raise RnnzooError(f"{path} does not fit this version of rnnzoo: {' '.join(str(error).split())}") from error


def auto_map(config: RecurrentConfig) -> dict[str, str]:
    """Auto class -> where transformers finds the model's own."""
    names = {"AutoConfig": type(config).__name__, **_models(config)}
    return {auto: f"{Path(CODE_FILE).stem}.{name}" for auto, name in names.items()}


def standalone_code(config: RecurrentConfig) -> dict[str, str]:
    """The source of each file that a model needs, by name."""
    configuration = type(config).__module__.partition(".")[2]
    modeling = configuration.replace("configuration_", "modeling_")
    named = (name.partition(".")[0] for name in (*(config.layer_types or ()), config.channel_mixer))
    modules = _with_imports([modeling, *(f"zoo.{name}.modeling_{name}" for name in named if name in architectures())])
    carried = tuple(name for name in architectures() if f"zoo.{name}.modeling_{name}" in modules)
    modules[FOLDERS] = FOLDERS_CODE.format(names=carried)
    modules[C_SOURCES] = C_SOURCES_CODE.format(texts="".join(_c_texts({name.split(".")[1] for name in modules})))
    imports = "\n".join(f"    from .{_flat(name)} import *" for name in sorted(modules))
    models = ", ".join(_models(config).values())
    names = {"configuration": _flat(configuration), "modeling": _flat(modeling), "config": type(config).__name__}
    entry = ENTRY.format(**names, models=models, imports=imports)
    layers = ", ".join(dict.fromkeys(config.layer_types or ()))
    files = {CODE_FILE: HEADER % f"the code of a model with layers {layers}." + entry}
    for name, code in modules.items():
        what = "written for this model" if name in (FOLDERS, C_SOURCES) else "as it is but for its imports"
        files[f"{_flat(name)}.py"] = HEADER % f"{name}, {what}." + code
    return files


def _models(config: RecurrentConfig) -> dict[str, str]:
    """Auto class -> name of the model's class."""
    return {auto: type(config).__name__.removesuffix("Config") + head for auto, head in HEADS.items()}


def _c_texts(folders: set[str]) -> list[str]:
    """Assignments of the common headers, and of the C code in these folders of the kernels."""
    sources = {name: text for name, text in c_sources().items() if "/" not in name or name.split("/")[0] in folders}
    for name, text in sources.items():
        assert '"""' not in text and text.endswith("\n"), f"{name} cannot stand in a raw string"
    return [f'\nTEXTS["{name}"] = r"""{text}"""\n' for name, text in sources.items()]


def _with_imports(waiting: list[str]) -> dict[str, str]:
    """Sources of these modules, and of all that they import at any place, by dotted name below rnnzoo."""
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name], imported = _for_one_folder(name)
            waiting += imported
    return found


def _path(module: str) -> Path | None:
    place = ROOT.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _flat(module: str) -> str:
    return module.replace(".", "_")


@functools.cache
def _for_one_folder(module: str) -> tuple[str, tuple[str, ...]]:
    """The source of a module with its imports rewritten for one folder, and the modules that it imports."""
    path = _path(module)
    assert path is not None, f"rnnzoo has no module {module}"
    text = path.read_text(encoding="utf-8")
    package = module.split(".")[: None if path.name == "__init__.py" else -1]
    lines, imported = text.splitlines(keepends=True), []
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in sorted(nodes, key=lambda node: -node.lineno):
        first, last = node.lineno - 1, node.end_lineno or 0
        before, after = lines[first][: node.col_offset], lines[last - 1][node.end_col_offset :]
        statement = ast.get_source_segment(text, node) or ""
        if isinstance(node, ast.ImportFrom) and node.level:
            target = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            statement, named = _relative(statement, target, node.names)
            imported += named
        elif not _top_level(node) <= INSTALLED:
            statement = f"try:\n{before}    {statement}\n{before}finally:\n{before}    pass"
        lines[first:last] = [before + statement + after]
    return "".join(lines), tuple(imported)


def _relative(statement: str, target: str, names: list[ast.alias]) -> tuple[str, list[str]]:
    """An import from module `target` for one folder, and the modules that it imports: `target`, or those in it."""
    modules = {alias: f"{target}.{alias.name}" for alias in names if _path(f"{target}.{alias.name}") is not None}
    if not modules:
        return re.sub(r"^from\s+[.\w]+", f"from .{_flat(target)}", statement), [target]
    assert len(modules) == len(names), f"modules and other names in one statement: {statement}"
    flat = (f"{_flat(module)} as {alias.asname or alias.name}" for alias, module in modules.items())
    return f"from . import {', '.join(flat)}", list(modules.values())


def _top_level(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The packages that an absolute import is from."""
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}
