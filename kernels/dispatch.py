"""Which implementation of an operation runs: the fastest backend that supports the call, unless somebody chose one.

An operation (`gated_linear_attention`, `short_conv`, ...) has several backends, one module each, that are equal up to
rounding. The usual four are registered by `registration.py`; any other is a new module and its registration beside it:

    register("gated_linear_attention", "other", _other, priority=10)

where `_other()` imports the module and returns its function. It is called when the backend is first chosen, so a
missing library costs nothing at import. The function takes the operation's arguments by keyword, without `backend` and
with every default filled in.

Who decides, first match wins: the argument `backend=`, `with use_backend("reference"):`, the environment variable
RNNZOO_BACKEND, the highest priority among the backends that are available and support the call. `backend=` is strict: a
backend that the operation does not have, or that cannot do the call, is an error. The other two hold for the whole
process and every operation, so they are preferences: where such a backend cannot serve, the automatic choice does, and
the log says so once. A name that no operation has is an error in any case.

A call with nothing in it (no row in the batch, no channel) is for the loops in `reference.py` alone, which need no
special case for it; faster backends divide their work by these sizes.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
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
# What may be preferred before any operation was imported; whatever else is registered is known from then on.
NAMES = ("triton", "cpu", "chunked", "reference")
# A plain global, not a context variable: torch.compile can read it and recompiles when it changes.
_chosen: str | None = None
# The blocks of `use_backend` that are open, in any thread: the last to be entered decides.
_blocks: list[list[str | None]] = []
_entering = threading.Lock()
# What may have no width in a call that is not empty: a window without a linear part has no features and what goes by
# them, a convolution of one tap no state.
_MAY_BE_EMPTY = frozenset({"q", "k", "g", "bonus", "leaving", "state", "initial_state"})


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
    _ALIKE.clear()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every operation, in all threads, runs on backend `name` where it can; None: on any.

    Raises:
        RnnzooError: no operation has a backend of this name.
    """
    global _chosen
    _check_name(name, f"use_backend({name!r})")
    block = [name]
    with _entering:
        _blocks.append(block)
        _chosen = name
    try:
        yield
    finally:
        with _entering:
            _blocks[:] = [other for other in _blocks if other is not block]
            _chosen = _blocks[-1][0] if _blocks else None


def chosen_backend() -> str | None:
    """The backend that `use_backend` or the environment asks for; None: the choice is automatic.

    Raises:
        RnnzooError: the environment names a backend that no operation has.
    """
    if _chosen is not None:
        return _chosen
    name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    _check_name(name, f"{ENVIRONMENT_VARIABLE}={name}")
    return name


def _check_name(name: str | None, where: str) -> None:
    if name is not None and name not in NAMES and all(name not in table for table in _REGISTRY.values()):
        known = sorted({*NAMES, *(known for table in _REGISTRY.values() for known in table)})
        raise RnnzooError(f"{where}: no operation has the backend {name!r}; known are {', '.join(known)}.")


def dispatch(operation: str, call: dict[str, Any], backend: str | None = None) -> Any:
    """Runs `operation` with the keyword arguments `call` on the backend that the rules above select.

    Autocast is off inside, on the devices of all tensors of the call: each operation says in which dtype it computes
    (states in float32), and keeps to it.
    """
    function = select(operation, call, backend).load()
    devices = {x.device.type for x in call.values() if isinstance(x, torch.Tensor)}
    return _without_autocast([device for device in devices if torch.is_autocast_enabled(device)], function, call)


def _without_autocast(devices: list[str], function: Callable[..., Any], call: dict[str, Any]) -> Any:
    if not devices:
        return function(**call)
    with torch.autocast(devices[0], enabled=False):
        return _without_autocast(devices[1:], function, call)


def dispatch_alike(operation: str, call: dict[str, Any], alike: tuple[Any, ...], backend: str | None = None) -> Any:
    """`dispatch` for calls that are shorter than a choice: it is made once for all calls with the same `alike`.

    Args:
        call: its first argument is a tensor, and all tensors are on one device.
        alike: hashable, everything that the backends' `supports` look at (dtypes, devices, contiguity); the state's
            device among it.
    """
    device = next(iter(call.values())).device.type
    if (_chosen is None and ENVIRONMENT_VARIABLE in os.environ) or torch.is_autocast_enabled(device):
        return dispatch(operation, call, backend)
    key = (operation, backend, _chosen, alike, _is_empty(call))
    function = _ALIKE.get(key)
    if function is None:
        function = _ALIKE[key] = select(operation, call, backend).load()
    return function(**call)


def _is_empty(call: dict[str, Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and not x.numel() and name not in _MAY_BE_EMPTY for name, x in call.items())


def _refusal(backend: Backend, call: dict[str, Any]) -> str | None:
    """Why a backend does not serve this call; None where it does."""
    if backend.name != "reference" and _is_empty(call):
        return "an empty call, for the reference alone"
    return backend.available() or backend.supports(**call)


def select(operation: str, call: dict[str, Any], backend: str | None = None) -> Backend:
    """The backend that `dispatch` would run; RnnzooError where none, or not that of `backend=`, can serve the call."""
    table = _REGISTRY[operation]
    if backend is not None:
        if backend not in table:
            known = ", ".join(table)
            raise RnnzooError(f"backend= asks for {backend!r}, which {operation} does not have; it has {known}.")
        reason = _refusal(table[backend], call)
        if reason is not None:
            raise RnnzooError(f"backend= asks for {backend!r}, which cannot run this {operation}: {reason}.")
        return table[backend]
    preferred = chosen_backend()
    candidates = list(table.values())
    rejected = []
    if preferred in table:
        candidates.sort(key=lambda candidate: candidate.name != preferred)
    elif preferred is not None:
        rejected.append(f"{operation} has no backend {preferred}")
    for candidate in candidates:
        reason = _refusal(candidate, call)
        if reason is None:
            if not torch.compiler.is_compiling():
                because = "; ".join(rejected) or "first choice"
                logger.debug("%s runs on %s (%s)", operation, candidate.name, because)
                if preferred is not None and rejected:
                    _say_fallback(operation, preferred, candidate.name, rejected[0])
            return candidate
        rejected.append(f"not {candidate.name}: {reason}")
    raise RnnzooError(f"no backend can run this {operation}: {'; '.join(rejected)}.")


@functools.cache
def _say_fallback(operation: str, preferred: str, served: str, reason: str) -> None:
    logger.warning("%s was asked for, but %s runs on %s (%s)", preferred, operation, served, reason)


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
    return {name: _refusal(entry, call) for name, entry in _REGISTRY[operation].items()}
