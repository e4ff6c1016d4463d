"""The kernels and their backends on this machine, for `list` and `env`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__all__ = ["kernel_backends"]


def kernel_backends() -> dict[str, list[dict[str, Any]]]:
    """Operation -> its backends, fastest first: {"backend", "available", "reason" (why not; None where it is)}."""
    from ..kernels.dispatch import backends

    kernels = importlib.import_module("..kernels", __package__)
    # An operation registers its backends when its folder is imported.
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.ispkg:
            importlib.import_module(f"{kernels.__name__}.{module.name}")
    operations: dict[str, list[dict[str, Any]]] = {}
    for status in backends():
        entry = {"backend": status.backend, "available": status.reason is None, "reason": status.reason}
        operations.setdefault(status.operation, []).append(entry)
    return operations
