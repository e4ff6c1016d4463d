"""The C code of the kernels."""

from __future__ import annotations

from pathlib import Path

__all__ = ["c_sources"]

HERE = Path(__file__).resolve().parent


def c_sources() -> dict[str, str]:
    """Path below this folder -> text, of every recurrence's `cpu.c` and of all headers.

    Published models bring this module along written anew, with the texts in it.
    """
    return {path.relative_to(HERE).as_posix(): path.read_text("utf-8") for path in sorted(HERE.rglob("*.[ch]"))}
