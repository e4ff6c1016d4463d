"""Where the C code of the kernels lies."""

from __future__ import annotations

from pathlib import Path

__all__ = ["c_sources"]

HERE = Path(__file__).resolve().parent


def c_sources() -> Path:
    """The folder with a folder for each recurrence, `cpu.c` in it, and their common headers."""
    return HERE
