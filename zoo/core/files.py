"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ...kernels.errors import RnnzooError

__all__ = ["appearing", "expect_free"]


def expect_free(out: str | os.PathLike) -> None:
    """Raises RnnzooError where `out` is neither missing nor an empty folder."""
    out = pathlib.Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RnnzooError(f"{out} already exists and is not empty; choose another folder.")


@contextmanager
def appearing(out: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A scratch folder beside `out` that takes its place when the block ends without an error.

    With an error nothing is left, neither the scratch folder nor parents of `out` that were made for it.
    """
    out = pathlib.Path(out)
    existed = [parent for parent in (out.parent, *out.parent.parents) if parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            folder = pathlib.Path(scratch) / "model"
            folder.mkdir()
            yield folder
            if out.exists():
                out.rmdir()
            os.replace(folder, out)
    except BaseException:
        for parent in (out.parent, *out.parent.parents):
            if parent in existed:
                break
            with suppress(OSError):  # somebody else has put something into it
                parent.rmdir()
        raise
