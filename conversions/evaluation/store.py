"""Files of an evaluation: atomic JSON, the cache of finished pieces, hashes of models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...kernels.errors import RnnzooError
from ...kernels.files import read_object, replace_text

__all__ = ["Store", "folder_sha256", "read_json", "write_json"]

_SCHEMA = 1


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or none of it.

    Raises:
        RnnzooError: the folder cannot be written or the disk is full.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise RnnzooError(f"Cannot write {path}: {error.strerror or error}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file.

    Raises:
        RnnzooError: the file is not a JSON object.
    """
    return read_object(path, "delete it and run again") if path.exists() else {}


class Store:
    """Finished measurements in one file, so that an interrupted evaluation goes on where it stopped."""

    def __init__(self, path: Path):
        self.path = path
        found = read_json(path)
        self.entries: dict[str, Any] = found.get("entries", {}) if found.get("schema") == _SCHEMA else {}

    def get(self, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """The value stored under `key` (measure, settings, hashes), else what `measure` gives, kept at once."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        if digest not in self.entries:
            value = measure()
            self.entries[digest] = {"key": key, "value": value}
            write_json(self.path, {"schema": _SCHEMA, "entries": self.entries})
        return self.entries[digest]["value"]


def folder_sha256(folder: Path) -> str:
    """Content hash of a model folder: its configuration, its tokenizer and its weights."""
    digest = hashlib.sha256()
    files = sorted(
        [*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json", folder / "tokenizer.json"]
    )
    for path in files:
        if path.exists():
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()
