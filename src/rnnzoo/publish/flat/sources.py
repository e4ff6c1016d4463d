"""The C code as texts, written to the cache when it is first compiled. Stands for `kernels/sources.py`."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from ...kernels.cache import cache_root

SOURCES: dict[str, str] = {}


def c_sources() -> Path:
    """The folder with the C code; it appears whole, whichever process makes it."""
    key = hashlib.sha256(repr(sorted(SOURCES.items())).encode()).hexdigest()[:16]
    folder = cache_root() / "sources" / key
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        for name, text in SOURCES.items():
            path = Path(made, "c", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        try:
            os.rename(Path(made, "c"), folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder
