"""Decoding by replay: the second token of a generation writes down what the layers do, the later ones do it again.

A step of a small model is bound by the time between operations, not by them. Within `replaying`, a model runs its
first one-token call on a cache under tapes (`kernels/tape`), one for each layer, and every later one as a replay of
the tapes, on the same memory. What grows or depends on values (attention over a cache that grows) runs as always,
between what is replayed; so does a layer with an operation that tapes do not know. Whatever a replay could miss (hooks,
gradients, training, another device, a state that somebody else put into the cache) ends it. Results are those of the
layers up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels.tape import Tape, available
from .mixer import Context, MixerState
from .rotary import Rotary

if TYPE_CHECKING:
    from .cache import RecurrentCache
    from .modeling import RecurrentModel

__all__ = ["Replay", "replaying"]

MOST_ROWS = 8  # of a batch: with more, matrix products for many rows are the faster ones
DTYPES = (torch.float32, torch.bfloat16)


@contextlib.contextmanager
def replaying(model: nn.Module) -> Iterator[None]:
    """Within the block, one-token calls of `model`, or of the decoder inside it, are replayed where that is possible.

    Nothing of the model may change within it: weights keep their memory, adapters and settings stay as they are.
    """
    from .modeling import RecurrentModel

    decoder = next((module for module in model.modules() if isinstance(module, RecurrentModel)), None)
    if decoder is None or decoder.decoding is not None or available() or not _may_be_replayed(decoder):
        yield
        return
    decoder.decoding = Replay()
    try:
        yield
    finally:
        decoder.decoding = None


def _may_be_replayed(model: RecurrentModel) -> bool:
    plain = all(weight.is_cpu and weight.dtype in DTYPES for weight in model.parameters())
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") or module.training
        for module in model.modules()
    )
    return plain and not hooked and model.perspectives is None


@dataclasses.dataclass
class _Layer:
    """One layer's step: its tape, and the memory that it reads and writes. With a problem, the layer runs as always."""

    tape: Tape
    hidden: Tensor
    carried: Tensor | None
    out: Tensor
    carries: Tensor | None
    state: MixerState | None
    memo: dict[Any, Any]

    @property
    def replayed(self) -> bool:
        return self.tape.problem is None


class Replay:
    """Steps of one model on one cache."""

    def __init__(self) -> None:
        self._layers: list[_Layer] = []
        self._cache: RecurrentCache | None = None
        self._positions: Tensor | None = None
        # The final norm: its tape, input and output.
        self._norm, self._given, self._out = Tape(), None, None
        self._ended = False
        self._thread = threading.get_ident()

    def serves(self, cache: RecurrentCache | None, hidden: Tensor, ctx: Context) -> bool:
        """Whether a call is to be made by `__call__`."""
        if self._ended or not ctx.in_place or cache is None or threading.get_ident() != self._thread:
            return False
        alike = hidden.dtype in DTYPES and hidden.shape[0] <= MOST_ROWS and all(s is not None for s in cache.states)
        if not alike or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if self._cache is not None:
            same = hidden.shape == self._layers[0].hidden.shape and ctx.positions.shape == self._positions.shape
            tapes = zip(self._layers, cache.states, strict=False)
            self._ended = not (same and cache is self._cache) or any(
                entry.replayed and entry.state is not state for entry, state in tapes
            )
        return not self._ended

    def __call__(self, model: RecurrentModel, cache: RecurrentCache, hidden: Tensor, ctx: Context) -> Tensor:
        """The normed output of the model's layers of one token (B, 1, D); the cache's states are updated."""
        if self._cache is None:
            return self._record(model, cache, hidden, ctx)
        self._positions.copy_(ctx.positions)
        carried = None
        for i, entry in enumerate(self._layers):
            if not entry.replayed:
                hidden, cache.states[i], carried = model.layers[i](hidden, cache.states[i], ctx, carried)
                continue
            _move(hidden, entry.hidden)
            _move(carried, entry.carried)
            entry.memo.clear()
            entry.tape.replay()
            hidden, carried = entry.out, entry.carries
        if self._norm.problem is not None:
            return model.norm(hidden)
        _move(hidden, self._given)
        self._norm.replay()
        return self._out.clone()  # the next token overwrites it

    def _record(self, model: RecurrentModel, cache: RecurrentCache, hidden: Tensor, ctx: Context) -> Tensor:
        self._positions, self._layers, carried = ctx.positions.clone(), [], None
        for i, layer in enumerate(model.layers):
            # By itself: what layers share for one call would be missing where one of them runs as always.
            rotary = Rotary(model.rotary, self._positions)
            state, tape = cache.states[i].map(_apart), Tape()
            own = dataclasses.replace(ctx, positions=self._positions, rotary=rotary, memo={}, outside=tape.outside)
            # A layer must not see whether its input is written by the one before.
            given = hidden.clone() if i == 0 else hidden
            with tape:
                out, after, carries = layer(given, state, own, carried)
            if tape.problem is None:
                _write_back(tape, after, state)
            if tape.problem is not None:
                state = after
            cache.states[i] = state
            self._layers.append(_Layer(tape, given, carried, out, carries, state, own.memo))
            hidden, carried = out, carries
        self._given = hidden
        with self._norm:
            self._out = model.norm(hidden)
        self._cache, self._ended = cache, not any(entry.replayed for entry in self._layers)
        return self._out.clone()


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
    for new, old in zip(after.tensors(), state.tensors(), strict=True):
        if new.data_ptr() != old.data_ptr():
            tape.copy(new, old)


def _form(value: Any) -> Any:
    """Everything of a state but the numbers in its tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.is_contiguous()
    if dataclasses.is_dataclass(value):
        return type(value), tuple(_form(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value
