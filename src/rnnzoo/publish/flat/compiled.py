"""The kernels in C of a model that has left rnnzoo: the one public name of the file with them, and its table.

`compiled_source` fills the table with what the model calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

Kernel = Callable[..., Any]
# Operation -> the kernel, why it cannot do a call, and what a call that leaves it out means.
COMPILED: dict[str, tuple[Kernel, Kernel, dict[str, Any]]] = {}


def in_c(operation: str, kernel: Kernel, call: dict[str, Any]) -> tuple[Kernel, dict[str, Any]]:
    """The C code with its arguments where there is a compiler and it can do the call; else what was given.

    RNNZOO_BACKEND=chunked keeps to what was given.
    """
    compiled, supports, absent = COMPILED[operation]
    whole = {**absent, **call}
    if os.environ.get("RNNZOO_BACKEND", "cpu") != "cpu" or supports(**whole) is not None:
        return kernel, call
    return compiled, whole
