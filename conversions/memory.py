"""Memory settings of long runs."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

__all__ = ["keep_freed_memory", "return_freed_memory"]

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets this process keep freed memory for its next tensors instead of giving it back to the system.

    glibc maps every large block anew and the system then fills it page by page; measured in training on two cores, this
    took a sixth of the time, and much more on a virtual machine whose host is short of memory. No effect without glibc.

    It holds for the whole process and cannot be taken back: for commands and scripts, which own theirs.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Gives what was freed so far back to the system after all: between stages, whose tensors are of other sizes."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        gc.collect()
        trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
