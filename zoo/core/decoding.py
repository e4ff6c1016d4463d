"""Decoding by replay: the second token of a generation writes down what the layers do, the later ones do it again.

A step of a small model is bound by the time between operations, not by them. Within `replaying`, a model runs its
first one-token call on a cache under tapes (`kernels/tape`), one for each layer, and every later one as a replay of
the tapes, on the same memory. What grows or depends on values (attention over a cache that grows) runs as always,
between what is replayed; so does a layer with an operation that tapes do not know. Whatever a replay could miss (hooks,
gradients, training, another device, a state that somebody else put into the cache) ends it. Threads that decode with
one model have tapes and memory of their own. Results are those of the layers up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.tape import Tape, available
from .cache import RecurrentCache
from .mixer import Context, MixerState
from .model import RecurrentModel
from .rotary import Rotary

__all__ = ["Replays", "replaying"]

MOST_ROWS = 8  # of a batch: with more, matrix products for many rows are the faster ones
DTYPES = (torch.float32, torch.bfloat16)


_entering = threading.Lock()


@contextlib.contextmanager
def replaying(model: nn.Module) -> Iterator[None]:
    """Within the block, one-token calls of `model`, or of the decoder inside it, are replayed where that is possible.

    Nothing of the model may change within it: weights keep their memory, adapters and settings stay as they are.
    """
    decoder = next((module for module in model.modules() if isinstance(module, RecurrentModel)), None)
    if decoder is None or available() or not _may_be_replayed(decoder):
        yield
        return
    me = threading.get_ident()
    with _entering:
        runner = decoder.decoding = decoder.decoding or Replays()
        inner = me in runner.of_thread  # of a block that this thread is in already
        if not inner:
            runner.of_thread[me] = Replay()
    try:
        yield
    finally:
        with _entering:
            if not inner:
                del runner.of_thread[me]
            if not runner.of_thread:
                decoder.decoding = None


def _may_be_replayed(model: RecurrentModel) -> bool:
    # Quantised and distributed weights are of classes of their own.
    plain = all(type(w) is nn.Parameter and w.is_cpu and w.dtype in DTYPES for w in model.parameters())
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") or module.training
        for module in model.modules()
    )
    return plain and not hooked and model.perspectives is None


@dataclasses.dataclass
class _Part:
    """Layers that follow each other under one tape, and the memory that it reads and writes.

    With a problem, it is one layer (`index`; None: the final norm), which runs as always.
    """

    tape: Tape
    index: int | None
    hidden: Tensor
    carried: Tensor | None
    out: Tensor
    carries: Tensor | None

    @property
    def replayed(self) -> bool:
        return self.tape.problem is None


class Replays:
    """What runs a model's steps: the `Replay` of each thread that decodes with it; the others run its layers.

    A copy of the model has none: it reduces to None.
    """

    def __init__(self) -> None:
        self.of_thread: dict[int, Replay] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def problems(self) -> dict[int, str]:
        return self.of_thread[threading.get_ident()].problems

    def serves(self, cache: RecurrentCache | None, hidden: Tensor, ctx: Context) -> bool:
        """Whether a call is to be made by `__call__`."""
        replay = self.of_thread.get(threading.get_ident())
        return replay is not None and replay.serves(cache, hidden, ctx)

    def __call__(self, model: RecurrentModel, cache: RecurrentCache, hidden: Tensor, ctx: Context) -> Tensor:
        """The normed output of the model's layers of one token (B, 1, D); the cache's states are updated."""
        return self.of_thread[threading.get_ident()](model, cache, hidden, ctx)


class Replay:
    """Steps of one model on one cache, in one thread.

    Attributes:
        problems: why a layer runs as always, by its number.
    """

    def __init__(self) -> None:
        self.problems: dict[int, str] = {}
        self._parts: list[_Part] = []
        self._states: dict[int, MixerState] = {}  # of the layers that are replayed
        self._cache: RecurrentCache | None = None
        self._positions: Tensor | None = None
        self._ended = False

    def serves(self, cache: RecurrentCache | None, hidden: Tensor, ctx: Context) -> bool:
        if self._ended or not ctx.in_place or cache is None:
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if self._cache is None:
            alike = hidden.dtype in DTYPES and hidden.shape[0] <= MOST_ROWS
            return alike and all(state is not None for state in cache.states)
        first = self._parts[0].hidden
        same = hidden.shape == first.shape and hidden.dtype == first.dtype
        mine = cache is self._cache and all(cache.states[i] is state for i, state in self._states.items())
        self._ended = not (same and mine and ctx.positions.shape == self._positions.shape)
        return not self._ended

    def __call__(self, model: RecurrentModel, cache: RecurrentCache, hidden: Tensor, ctx: Context) -> Tensor:
        if self._cache is None:
            return self._record(model, cache, hidden, ctx)
        self._positions.copy_(ctx.positions)
        carried = None
        for part in self._parts:
            i = part.index
            if part.replayed:
                _move(hidden, part.hidden)
                _move(carried, part.carried)
                part.tape.replay()
                hidden, carried = part.out, part.carries
            elif i is None:
                hidden = model.norm(hidden)
            else:
                hidden, cache.states[i], carried = model.layers[i](hidden, cache.states[i], ctx, carried)
        return hidden.clone()  # the next token overwrites it

    def _record(self, model: RecurrentModel, cache: RecurrentCache, hidden: Tensor, ctx: Context) -> Tensor:
        self._positions, self._parts, carried = ctx.positions.clone(), [], None
        hidden = hidden.clone()
        for i, layer in enumerate(model.layers):
            state, tape = cache.states[i].map(_apart), Tape()
            with tape:
                out, after, carries = layer(hidden, state, self._context(model, ctx, tape), carried)
            if tape.problem is None:
                _write_back(tape, after, state)
            if tape.problem is None:
                self._states[i] = state
            else:
                state, self.problems[i] = after, tape.problem
            cache.states[i] = state
            self._add(_Part(tape, i, hidden, carried, out, carries))
            hidden, carried = out, carries
        with Tape() as tape:
            out = model.norm(hidden)
        self._add(_Part(tape, None, hidden, carried, out, carried))
        self._cache, self._ended = cache, not self._states
        return out.clone()

    def _context(self, model: RecurrentModel, ctx: Context, tape: Tape) -> Context:
        """For one layer by itself: what layers share for one call would be missing where one of them runs as always."""
        memo: dict[Any, Any] = {}

        def outside(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
            def afresh(*tensors: Tensor) -> Tensor:
                memo.clear()
                return function(*tensors)

            return tape.outside(afresh, *tensors)

        rotary = Rotary(model.rotary, self._positions)
        return dataclasses.replace(ctx, positions=self._positions, rotary=rotary, memo=memo, outside=outside)

    def _add(self, part: _Part) -> None:
        last = self._parts[-1] if self._parts else None
        if last is not None and last.replayed and part.replayed:
            last.tape.then(part.tape)
            last.out, last.carries = part.out, part.carries
        else:
            self._parts.append(part)


def _apart(tensor: Tensor) -> Tensor:
    """A copy in memory of its own."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _move(given: Tensor | None, to: Tensor | None) -> None:
    if given is not to:
        to.copy_(given)


def _write_back(tape: Tape, after: MixerState | None, state: MixerState) -> None:
    """Lets the tape end with the new state in the memory of the old one."""
    if _form(after) != _form(state):
        tape.problem = "a state that changes its form"
        return
    moved = [
        pair for pair in zip(after.tensors(), state.tensors(), strict=True) if pair[0].data_ptr() != pair[1].data_ptr()
    ]
    held = {old.untyped_storage().data_ptr() for old in state.tensors()}
    if any(new.untyped_storage().data_ptr() in held for new, _ in moved):
        tape.problem = "a state whose parts change places"
        return
    for new, old in moved:
        tape.copy(new, old)


def _form(value: Any) -> Any:
    """Everything of a state but the numbers in its tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.is_contiguous()
    if dataclasses.is_dataclass(value):
        return type(value), tuple(_form(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value
