"""Where rnnzoo keeps what it fetches or builds once."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """The folder for what is made once: $RNNZOO_CACHE, else beside the Hub's cache, else the user's cache."""
    if chosen := os.environ.get("RNNZOO_CACHE"):
        return Path(chosen).expanduser()
    if hub_home := os.environ.get("HF_HOME"):
        return Path(hub_home).expanduser().parent / "rnnzoo"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rnnzoo"
