"""The backends that operations have in common, as the modules of an operation's folder.

    register_backends("linear_scan", "linear_scan_step", reference, chunked, cpu)

Each module has a function of the operation's name, with the operation's arguments by keyword. What is the same for all
operations is said here: which of the backends goes first, and that C and Triton read some dtypes on some devices.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from . import gpu, native
from .dispatch import register

__all__ = ["register_backends"]

Supports = Callable[..., str | None]


def register_backends(
    folder: str,
    operation: str,
    reference: ModuleType,
    chunked: ModuleType,
    cpu: ModuleType | None = None,
    triton: Callable[[], ModuleType] | None = None,
    *,
    cpu_supports: Supports | None = None,
    triton_supports: Supports | None = None,
) -> None:
    """Registers an operation's backends: reference, chunked and, where there are modules for them, cpu and triton.

    Args:
        folder: of `kernels/`, whose `cpu.c` the module `cpu` calls.
        triton: imports the module: it can be imported only where triton is installed. (A function with an import
            statement, because torch.compile can trace those and not `importlib`.)
        cpu_supports, triton_supports: called with a call's arguments by keyword; None, or why the backend cannot do
            it. By default what `native.supports`, or `gpu.supports`, says of the whole call.
    """
    register(operation, "reference", lambda: getattr(reference, operation), priority=0)
    register(operation, "chunked", lambda: getattr(chunked, operation), priority=10)
    if cpu is not None:
        register(
            operation,
            "cpu",
            lambda: getattr(cpu, operation),
            priority=20,
            supports=cpu_supports or (lambda **call: native.supports(folder, call)),
            available=lambda: native.problem(folder, build=False),
        )
    if triton is not None:
        register(
            operation,
            "triton",
            lambda: getattr(triton(), operation),
            priority=gpu.priority(),
            supports=triton_supports or (lambda **call: gpu.supports(call)),
            available=gpu.problem,
        )
