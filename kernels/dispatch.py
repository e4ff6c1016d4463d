"""Which implementation of an operation runs: the fastest backend that supports the call, unless somebody chose one.

An operation (`gated_linear_attention`, `short_conv`, ...) has several backends, one module each, that are equal up to
rounding. A new backend is a new module and its registration beside the operation:

    def _chunked():
        from .chunked import gated_linear_attention

        return gated_linear_attention

    register("gated_linear_attention", "chunked", _chunked, priority=10)

The module is imported when the backend is first chosen, so a missing compiler or GPU library costs nothing at import.
Its function takes the operation's arguments by keyword, without `backend` and with every default filled in.

Who decides, first match wins: the argument `backend=`, `with use_backend("reference"):`, the environment variable
RNNZOO_BACKEND, the highest priority among the backends that are available and support the call. A name chosen by the
context or the environment that an operation does not have is an error, as is one that cannot do the call.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .errors import RnnzooError

__all__ = [
    "BackendStatus",
    "backends",
    "chosen_backend",
    "dispatch",
    "dispatch_alike",
    "explain",
    "register",
    "use_backend",
]

logger = logging.getLogger("rnnzoo.kernels")

ENVIRONMENT_VARIABLE = "RNNZOO_BACKEND"
# A plain global, not a context variable: torch.compile can read it and recompiles when it changes.
_chosen: str | None = None


def _always(**call: Any) -> None:
    """The default test: nothing speaks against it."""


@dataclass
class Backend:
    """One registered implementation; `function` is filled when its module is first imported."""

    operation: str
    name: str
    importer: Callable[[], Callable[..., Any]]
    priority: int
    supports: Callable[..., str | None]
    available: Callable[[], str | None]
    function: Callable[..., Any] | None = None

    def load(self) -> Callable[..., Any]:
        if self.function is None:
            self.function = self.importer()
        return self.function


@dataclass(frozen=True)
class BackendStatus:
    """What `rnnzoo env` prints: `reason` says why the backend is not available here, None where it is."""

    operation: str
    backend: str
    priority: int
    reason: str | None


_REGISTRY: dict[str, dict[str, Backend]] = {}
_ALIKE: dict[tuple[Any, ...], Callable[..., Any]] = {}


def register(
    operation: str,
    backend: str,
    importer: Callable[[], Callable[..., Any]],
    *,
    priority: int,
    supports: Callable[..., str | None] = _always,
    available: Callable[[], str | None] = _always,
) -> None:
    """Adds a backend to an operation.

    Args:
        operation: the operation's name. backend: the backend's name, as in RNNZOO_BACKEND.
        importer: imports the backend's module and returns its function; called at first use. (Functions with an import
            statement, because torch.compile can trace those and not `importlib`.)
        priority: the highest one that can serve a call does.
        supports: called with the call's arguments by keyword; None, or why it cannot do this call.
        available: None, or why it cannot run on this machine.
    """
    table = _REGISTRY.setdefault(operation, {})
    table[backend] = Backend(operation, backend, importer, priority, supports, available)
    _REGISTRY[operation] = dict(sorted(table.items(), key=lambda item: -item[1].priority))


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every operation, in all threads, runs on backend `name` (None: back to the automatic choice)."""
    global _chosen
    if name is not None and all(name not in table for table in _REGISTRY.values()):
        known = sorted({known for table in _REGISTRY.values() for known in table})
        raise RnnzooError(f"use_backend({name!r}): no operation has this backend; known: {', '.join(known)}.")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def chosen_backend() -> str | None:
    """The backend that `use_backend` or the environment asks for; None: the choice is automatic."""
    return _chosen if _chosen is not None else os.environ.get(ENVIRONMENT_VARIABLE) or None


def dispatch(operation: str, call: dict[str, Any], backend: str | None = None) -> Any:
    """Runs `operation` with the keyword arguments `call` on the backend that the rules above select.

    Autocast is off inside: each operation says in which dtype it computes (states in float32), and keeps to it.
    """
    function = select(operation, call, backend).load()
    device = next((x.device.type for x in call.values() if isinstance(x, torch.Tensor)), "cpu")
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return function(**call)
    return function(**call)


def dispatch_alike(operation: str, call: dict[str, Any], alike: tuple[Any, ...], backend: str | None = None) -> Any:
    """`dispatch` for calls that are shorter than a choice: it is made once for all calls with the same `alike`.

    Args:
        alike: hashable, everything that the backends' `supports` look at (dtypes, devices, contiguity); the state's
            device among it.
    """
    name = backend if backend is not None else _chosen
    if (name is None and ENVIRONMENT_VARIABLE in os.environ) or torch.is_autocast_enabled("cpu"):
        return dispatch(operation, call, backend)
    function = _ALIKE.get((operation, name, alike))
    if function is None:
        function = _ALIKE[operation, name, alike] = select(operation, call, name).load()
    return function(**call)


def select(operation: str, call: dict[str, Any], backend: str | None = None) -> Backend:
    """The backend that `dispatch` would run; RnnzooError where none, or not the chosen one, can serve the call."""
    table = _REGISTRY[operation]
    name, origin = backend, "backend="
    if name is None:
        name, origin = chosen_backend(), ENVIRONMENT_VARIABLE if _chosen is None else "use_backend"
    if name is not None:
        if name not in table:
            raise RnnzooError(
                f"{origin} asks for backend {name!r}, which {operation} does not have; it has: {', '.join(table)}."
            )
        reason = table[name].available() or table[name].supports(**call)
        if reason is not None:
            raise RnnzooError(f"{origin} asks for backend {name!r}, which cannot run this {operation}: {reason}.")
        return table[name]
    rejected = []
    for candidate in table.values():
        reason = candidate.available() or candidate.supports(**call)
        if reason is None:
            if not torch.compiler.is_compiling():
                because = "; ".join(rejected) or "first choice"
                logger.debug("%s runs on %s (%s)", operation, candidate.name, because)
            return candidate
        rejected.append(f"not {candidate.name}: {reason}")
    raise RnnzooError(f"no backend can run this {operation}: {'; '.join(rejected)}.")


def backends(operation: str | None = None) -> list[BackendStatus]:
    """Every backend of one operation, or of all imported ones, fastest first, and why it is not available here."""
    names = [operation] if operation is not None else sorted(_REGISTRY)
    return [
        BackendStatus(entry.operation, entry.name, entry.priority, entry.available())
        for name in names
        for entry in _REGISTRY[name].values()
    ]


def explain(operation: str, call: dict[str, Any]) -> dict[str, str | None]:
    """For each backend of `operation`, fastest first: None where it could serve `call`, else the reason why not."""
    return {name: entry.available() or entry.supports(**call) for name, entry in _REGISTRY[operation].items()}
