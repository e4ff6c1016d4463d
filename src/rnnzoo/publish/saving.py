"""A copy of a model's folder that holds what is needed to use it, complete or not there at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from ..cards.published import published_files
from ..cards.render import render_card
from ..kernels.errors import RnnzooError
from ..zoo.core.files import appearing, expect_free
from .standalone import load_config, standalone_files

__all__ = ["save_model"]


def save_model(folder: str | Path, out: str | Path, *, standalone: bool = False) -> Path:
    """Copies the model in a folder, with tokenizer, card and results, but without what training left behind.

    Args:
        out: a new or empty folder. standalone: add code and `auto_map`, so that the model loads without rnnzoo by
            `trust_remote_code=True`.
    Raises:
        RnnzooError: no model of rnnzoo in `folder`, or `out` is taken.
    """
    folder, out = Path(folder), Path(out)
    load_config(folder)
    files, _ = published_files(folder)
    if out.resolve() == folder.resolve():
        raise RnnzooError(f"{out} is the model's own folder; choose another one for the copy.")
    expect_free(out)
    try:
        with appearing(out) as copy:
            for file in files:
                target = copy / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(file.source, bytes):
                    target.write_bytes(file.source)
                else:
                    shutil.copyfile(file.source, target)
            for name, content in (standalone_files(folder) if standalone else {}).items():
                (copy / name).write_bytes(content)
            # The card says how the model loads.
            if standalone and (copy / "results.json").is_file() and (copy / "README.md").is_file():
                render_card(copy)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise RnnzooError(f"{out} cannot be written: {error.strerror or error}.") from error
    return out
