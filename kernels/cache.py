"""Where rnnzoo keeps what it fetches or builds once."""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

__all__ = ["build_folder", "cache_root"]

log = logging.getLogger("rnnzoo.kernels")


def cache_root() -> Path:
    """The folder for what is made once: $RNNZOO_CACHE, else inside the Hub's cache ($HF_HOME), else the user's cache.

    Raises:
        RuntimeError: none of these is set, and the user has no home folder.
    """
    if chosen := os.environ.get("RNNZOO_CACHE"):
        return Path(chosen).expanduser()
    if hub_home := os.environ.get("HF_HOME"):
        return Path(hub_home).expanduser() / "rnnzoo"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rnnzoo"


def build_folder(folder: Path) -> Path:
    """`folder`, made; where it cannot be written, one of this name among the temporary files that only the user reads.

    What is loaded as code may come from no folder that another user can write to.

    Raises:
        OSError: that cannot be written either, or is not the user's alone.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "no permission"
    except OSError as error:
        reason = error.strerror or str(error)
    private = _private_folder() / folder.name
    private.mkdir(exist_ok=True)
    _say_temporary(folder, reason, private)
    return private


def _private_folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else None  # on Windows temporary files are the user's own
    path = Path(tempfile.gettempdir()) / ("rnnzoo" if user is None else f"rnnzoo-{user}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if user is not None and (not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077):
        raise PermissionError(f"{path} is not a folder of this user alone; set RNNZOO_CACHE to one")
    return path


@functools.cache
def _say_temporary(folder: Path, reason: str, private: Path) -> None:
    log.warning(
        "%s cannot be written (%s): builds are kept in %s; RNNZOO_CACHE chooses a folder", folder, reason, private
    )
