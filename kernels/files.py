"""Files that are written whole or not at all, JSON, and what a weight file says of itself unread; plain Python."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import RnnzooError

__all__ = ["check_safetensors", "object_or_nothing", "read_object", "replace_text", "replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place when the block ends; after an error or a kill the old file
    is still there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Puts `text` in the place of the file, as UTF-8."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RnnzooError: it cannot be read, or holds something else; `remedy` says what to do.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise RnnzooError(f"{path} is not readable JSON ({error}); {remedy}.") from None
    return value


def object_or_nothing(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none that can be read."""
    try:
        return read_object(path, "")
    except RnnzooError:
        return {}


def check_safetensors(path: Path, remedy: str = "download it again") -> None:
    """Reads the header of a safetensors file and compares it with the file's length; reads no tensor.

    Raises:
        RnnzooError: missing, empty, a Git LFS pointer, an unreadable header, or fewer bytes than the header promises.
    """
    if not path.is_file():
        raise RnnzooError(f"The weight file {path} is missing; {remedy}.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise RnnzooError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in that folder.")
        length = int.from_bytes(start, "little")
        try:
            if len(start) < 8 or length > size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise RnnzooError(
                f"{path} is not a readable safetensors file ({size} bytes; its header is damaged); {remedy}."
            ) from error
    promised = 8 + length + max(ends, default=0)
    if promised != size:
        raise RnnzooError(f"{path} is damaged: its header describes {promised} bytes, the file has {size}; {remedy}.")
