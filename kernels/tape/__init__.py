"""A tape: what one call did, to be done again on the same memory by a few calls of C.

Decoding a token of a small model is some hundred operations of a few microseconds, and most of the time goes by between
them. While a `Tape` is the active context, it writes down every operation of torch and every call of the kernels' own
C code, with the addresses that they read and write; `replay` does the same again, on the values that are there then.
It is to CPUs what CUDA graphs are to GPUs, on the same conditions: the same shapes, and nothing that depends on values.

    with Tape() as tape:
        y = f(x)
    if tape.problem is None:
        x.copy_(other)
        tape.replay()              # y is f(other), up to rounding
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from .. import native
from ..dispatch import chosen_backend
from .lowering import Unsupported, lower

__all__ = ["Tape", "available"]

Call = tuple[Callable[..., None], tuple[Any, ...]]

# Tapes of several threads are written one after the other: torch notes in globals of the process that a mode is active,
# and puts back what it found there, so modes that overlap would leave that one is.
_writing = threading.RLock()


def available() -> str | None:
    """Why tapes are not replayed here; None where they are."""
    if chosen_backend() not in (None, "cpu"):
        return f"the backend {chosen_backend()!r} was asked for"
    return native.problem("tape")


class Tape(TorchDispatchMode):
    """The operations under it, in order.

    Attributes:
        problem: the first operation that cannot be replayed, or None. From there on nothing more is written down.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problem: str | None = available()
        # Steps that follow each other as one list, and calls of other functions.
        self._entries: list[list[bytes] | Call] = []
        self._calls: list[Call] | None = None
        # Whatever was seen stays allocated, so that no address is used twice.
        self._kept: list[Any] = []
        # Of operations with several results, only the first is made again (norms return their statistics, too). The
        # memory of the others.
        self._unwritten: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and leaving torch.compile out costs as much as an operation

    def __enter__(self) -> Tape:
        _writing.acquire()
        native.calls.listener, self._before = self._native, native.calls.listener
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        native.calls.listener = self._before
        _writing.release()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.problem is None:
            self._kept.append((args, kwargs, result))
            try:
                if self._unwritten and any(_memory(x) in self._unwritten for x in _tensors((args, kwargs))):
                    raise Unsupported("a second result of an operation")
                self._note(lower(func, args, kwargs, result, self._kept))
            except Unsupported as reason:
                self.problem = str(reason)
            if isinstance(result, tuple):
                self._unwritten |= {_memory(x) for x in _tensors(result[1:]) if x.numel()}
        return result

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Adds: target becomes source, of the same shape."""
        with self:
            target.copy_(source)

    def outside(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Calls `function` past the tape; a replay calls it again, on the same tensors, for a result of one shape."""
        if self.problem is not None:
            return function(*tensors)
        before, native.calls.listener = native.calls.listener, None
        try:
            with _disable_current_modes():
                result = function(*tensors)
        finally:
            native.calls.listener = before
        self._entries.append((lambda: result.copy_(function(*tensors)), ()))
        self._kept.append((tensors, result))
        return result

    def then(self, other: Tape) -> None:
        """Adds what `other` has written down."""
        for entry in other._entries:
            if isinstance(entry, list):
                self._note(entry)
            else:
                self._entries.append(entry)
        self._kept.append(other)

    def replay(self) -> None:
        """Does again what was written down."""
        if self._calls is None:
            self._calls = [_run(entry) if isinstance(entry, list) else entry for entry in self._entries]
        for run, arguments in self._calls:
            run(*arguments)

    def _note(self, steps: list[bytes]) -> None:
        if not self._entries or not isinstance(self._entries[-1], list):
            self._entries.append([])
        self._entries[-1] += steps
        self._calls = None

    def _native(self, entry: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.problem is None:
            self._entries.append((entry, arguments))


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _run(steps: list[bytes]) -> Call:
    run = native.function("tape", "tape_run", "pii")
    return run, (b"".join(steps), len(steps), torch.get_num_threads())
