"""Which files of an output folder go to the Hub: what a model needs to be loaded, understood and made again.

Checkpoints, optimiser states, caches, locks and logs stay: they live in hidden folders or have none of these names.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..kernels.errors import RnnzooError
from ..kernels.files import check_safetensors, read_object

__all__ = ["PublishedFile", "local_paths", "published_files", "read_results", "stale_weights", "with_contents"]

PATTERNS = """
    *.safetensors *.safetensors.index.json config.json generation_config.json adapter_config.json tokenizer* vocab*
    merges* special_tokens_map.json added_tokens.json *.jinja additional_chat_templates/*.jinja *.model *.py README.md
    plots/*.png plots/*.svg results.json recipe.yaml LICENSE* NOTICE*""".split()
PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl", "*.pickle")
# What a repository's .gitattributes sends to large file storage when the Hub makes it; and anything above 10 MB.
LFS = ("*.safetensors", "*.model", "*.bin", "*.gz", "*.npz", "*.onnx", "*.parquet", "*.zip")
LFS_BYTES = 10_000_000
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_LOCAL = re.compile(r"(?<![\w/.:])(?:~|/(?:home|root|tmp|mnt|Users|var|data|scratch))/[^\s\"'\\,;)]+")


@dataclass(frozen=True)
class PublishedFile:
    """One file of a push: its path in the repository, where it is (or its bytes), its size, and whether it is expected
    in large file storage (the Hub decides)."""

    path: str
    source: Path | bytes
    size: int
    lfs: bool


def published_files(folder: str | Path) -> tuple[list[PublishedFile], list[str]]:
    """The files of a push, and the visible ones that stay here, both sorted by path.

    Raises:
        RnnzooError: no folder, no configuration or weights, weights that are pickled, cut short or not all there, or a
            file that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RnnzooError(f"There is no folder {folder}; give the output folder of rnnzoo convert, train or import.")
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise RnnzooError(f"{folder} holds no model (no config.json, no adapter_config.json); nothing to push.")
    found, left = [], []
    try:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.is_file() or any(part.startswith((".", "__")) for part in Path(name).parts):
                continue
            if any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in PATTERNS):
                size = path.stat().st_size
                found.append(PublishedFile(name, path, size, _large(name, size)))
            else:
                left.append(name)
        _check_weights(folder, found, left)
    except OSError as error:
        raise RnnzooError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from None
    return sorted([*found, *_recipe(folder, found)], key=lambda file: file.path), left


def _large(name: str, size: int) -> bool:
    return size > 0 and (size > LFS_BYTES or any(fnmatchcase(name, pattern) for pattern in LFS))


def _recipe(folder: Path, found: list[PublishedFile]) -> list[PublishedFile]:
    """recipe.yaml as results.json keeps it, so that `rnnzoo convert --recipe recipe.yaml` makes the model again."""
    text = ((read_results(folder) or {}).get("recipe") or {}).get("yaml")
    if not text or any(file.path == "recipe.yaml" for file in found):
        return []
    return [PublishedFile("recipe.yaml", text.encode(), len(text.encode()), False)]


def read_results(folder: str | Path) -> dict[str, Any] | None:
    """results.json of the folder, None where there is none.

    Raises:
        RnnzooError: it is no JSON object.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        return None
    return read_object(path, "run rnnzoo eval again")


def local_paths(folder: str | Path) -> list[str]:
    """Paths of this machine that results.json names and a push would make public."""
    path = Path(folder) / "results.json"
    return sorted(set(_LOCAL.findall(path.read_text(encoding="utf-8")))) if path.is_file() else []


def with_contents(files: list[PublishedFile], contents: dict[str, bytes]) -> list[PublishedFile]:
    """The files with these in their places or beside them, by path."""
    made = [
        PublishedFile(path, content, len(content), _large(path, len(content))) for path, content in contents.items()
    ]
    return sorted([*(file for file in files if file.path not in contents), *made], key=lambda file: file.path)


def stale_weights(remote: list[str], local: list[str]) -> list[str]:
    """Weight files of an earlier push that this one does not have: transformers might load them instead of ours."""
    return [n for n in remote if n not in local and "/" not in n and any(fnmatchcase(n, p) for p in WEIGHTS)]


def _check_weights(folder: Path, found: list[PublishedFile], left: list[str]) -> None:
    weights = [file for file in found if file.path.endswith(".safetensors")]
    if not weights:
        pickled = [name for name in left if any(fnmatchcase(name, pattern) for pattern in PICKLED)]
        if pickled:
            raise RnnzooError(
                f"{folder} holds its weights as pickles ({pickled[0]}), which can run code where they are loaded; "
                "save the model with `save_pretrained`, which writes safetensors."
            )
        raise RnnzooError(f"{folder} holds no weights (no *.safetensors); nothing to push.")
    for file in weights:
        check_safetensors(folder / file.path, "save the model again")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RnnzooError(f"{index} is damaged ({type(error).__name__}); save the model again.") from None
        if missing := sorted(named - {file.path for file in weights}):
            raise RnnzooError(f"{folder} lacks {missing[0]}, which {index.name} names; save the model again.")
