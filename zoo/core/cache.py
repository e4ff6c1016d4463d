"""The memory of a model between calls: one mixer state per layer, with exact rollback.

`crop(-n)` cannot subtract tokens from a recurrent state. While recording is on, the cache therefore keeps the states of
a checkpoint and the inputs of every layer since, and rolls back by running the mixers again over the inputs that stay.
This is what assisted decoding and prompt lookup need; nothing is kept per token but one hidden vector per layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...kernels.errors import RnnzooError
from .documents import Layout, Progress, lay_out
from .mixer import MixerState

__all__ = ["CACHE_NAME", "RecurrentCache"]

# What transformers calls a cache in arguments and outputs: "cache" from 5.24 on, "past_key_values" before.
_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"


@dataclasses.dataclass
class _Call:
    """One recorded forward pass: its arguments and the input of every block, (B, T, D) each."""

    mask: Tensor | None
    ids: Tensor | None
    named: bool
    shape: tuple[int, int]
    prefix: Tensor | None
    hidden: list[Tensor]

    @property
    def plain(self) -> bool:
        return self.mask is None and self.ids is None and self.prefix is None

    def first(self, columns: int) -> _Call:
        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :columns]

        hidden = [h[:, :columns] for h in self.hidden]
        return _Call(cut(self.mask), cut(self.ids), self.named, (self.shape[0], columns), cut(self.prefix), hidden)

    def select(self, rows: Callable[[Tensor], Tensor]) -> _Call:
        mask, ids, prefix = (None if x is None else rows(x) for x in (self.mask, self.ids, self.prefix))
        hidden = [rows(h) for h in self.hidden]
        return _Call(mask, ids, self.named, (hidden[0].shape[0], self.shape[1]), prefix, hidden)


@dataclasses.dataclass
class _Checkpoint:
    states: list[MixerState | None]
    progress: Progress | None


class RecurrentCache(Cache):
    """States of all layers. Give it as `cache` (or `past_key_values`); a model with `use_cache=True` makes one itself.

    Args:
        num_layers: number of layers of the model, or its configuration.
    """

    def __init__(self, num_layers: int | object):
        super().__init__(layers=[])
        count = num_layers if isinstance(num_layers, int) else num_layers.num_hidden_layers
        self.states: list[MixerState | None] = [None] * count
        self.progress: Progress | None = None
        self.length = 0
        self.recording = False
        self._checkpoint: _Checkpoint | None = None
        self._calls: list[_Call] = []
        self._run_again: Callable[..., None] | None = None

    # What a model calls ---------------------------------------------------------------------------------------------

    def advance(
        self, mask: Tensor | None, ids: Tensor | None, named: bool, shape: tuple[int, int], device: torch.device
    ) -> Layout:
        """Takes in the columns of a call; see `lay_out`. The states must be updated by the caller, layer by layer."""
        layout = lay_out(self.progress, mask, ids, named, shape, device)
        # On another device than a CPU, to ask whether any row restarts would be to wait for it.
        if layout.restart is not None and (layout.restart.device.type != "cpu" or bool(layout.restart.any())):
            self.states = [None if s is None else s.reset_rows(layout.restart) for s in self.states]
        self.progress = layout.progress
        self.length += shape[1]
        return layout

    def begin_recording(
        self,
        run_again: Callable[..., None],
        mask: Tensor | None,
        ids: Tensor | None,
        named: bool,
        shape: tuple[int, int],
        prefix: Tensor | None = None,
    ) -> None:
        """Must precede `advance` of the same call.

        Args:
            run_again: brings this cache to a later state, by running the model's layers over recorded inputs:
                `run_again(inputs, cache, mask, ids, named, prefix)`.
        """
        if self.recording:
            if self._checkpoint is None:
                self._checkpoint = _Checkpoint(list(self.states), self.progress)
            self._run_again = run_again
            self._calls.append(_Call(mask, ids, named, shape, prefix, []))

    def record(self, hidden: Tensor) -> None:
        """Notes the input of the next layer of this call."""
        if self.recording:
            self._calls[-1].hidden.append(hidden.detach())

    def end_recording(self) -> None:
        """Joins one-token calls, as a drafting model makes them, so that a replay is one pass."""
        if self.recording and len(self._calls) > 1 and self._calls[-1].plain and self._calls[-2].plain:
            new, old = self._calls.pop(), self._calls.pop()
            hidden = [torch.cat(pair, 1) for pair in zip(old.hidden, new.hidden, strict=True)]
            shape = (old.shape[0], old.shape[1] + new.shape[1])
            self._calls.append(_Call(None, None, False, shape, None, hidden))

    # What generation and users call ---------------------------------------------------------------------------------

    @property
    def seen(self) -> Tensor | None:
        """(B,) int64: tokens of the current document so far, padding not counted. None before the first call."""
        return None if self.progress is None else self.progress.seen

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"RecurrentCache(layers={len(self)}, length={self.length}, bytes={self.num_bytes()})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def is_initialized(self) -> bool:
        return self.progress is not None

    @property
    def is_croppable(self) -> bool:
        return self.recording

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        # Read by generate(), which leaves out what a cache has read only where not all layers are.
        return [False] * len(self)

    def num_bytes(self) -> int:
        """Bytes of all states; what recording keeps is not counted."""
        return sum(state.num_bytes() for state in self.states if state is not None)

    def detach(self) -> RecurrentCache:
        """Cuts the states from the autograd graph, in place, for training across calls. Returns itself."""
        self._map_states(lambda state: state.map(Tensor.detach))
        return self

    def reset(self) -> None:
        """Forgets everything."""
        self.states = [None] * len(self)
        self.progress, self.length = None, 0
        self._checkpoint, self._calls = None, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx` (int64) of the batch, for beam search."""
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`, integers or booleans."""
        self._select(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._select(lambda x: x.repeat_interleave(repeats, 0))

    def activate_past_recording(self) -> None:
        """From the next call on, keep what `crop` needs."""
        self.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last columns, exactly, and makes the present state the new checkpoint.

        Args:
            tokens_to_remove: 0 or negative.

        Raises:
            RnnzooError: recording was off, or did not start that long ago, or a part of a prefix would go.
            ValueError: a positive argument (an absolute length, as older transformers had it).
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}.")
        removed = -tokens_to_remove
        recorded = sum(call.shape[1] for call in self._calls)
        if removed > recorded:
            raise RnnzooError(
                f"crop should remove {removed} tokens, but {recorded} were recorded; call "
                "activate_past_recording() before the tokens that may be taken back."
            )
        self._expect_whole_prefixes(recorded - removed)
        calls, checkpoint = self._calls, self._checkpoint
        self._calls, self._checkpoint = [], None
        if removed:
            self.states, self.progress = list(checkpoint.states), checkpoint.progress
            self.length -= recorded
            self._replay(calls, recorded - removed)

    def _expect_whole_prefixes(self, columns: int) -> None:
        """That the first `columns` recorded ones end in no prefix: what stays of it would have seen what does not."""
        for call in self._calls:
            partly = 0 < columns < call.shape[1] and call.prefix is not None
            if partly and bool(call.prefix[:, columns:].any()):
                raise RnnzooError("crop would take back a part of a prefix; take back all of its call, or less.")
            columns -= call.shape[1]

    @torch.no_grad()
    def _replay(self, calls: list[_Call], columns: int) -> None:
        for call in calls:
            kept = call.first(min(columns, call.shape[1]))
            columns -= kept.shape[1]
            if kept.shape[1]:
                self._run_again(kept.hidden, self, kept.mask, kept.ids, kept.named, kept.prefix)

    # Inside ---------------------------------------------------------------------------------------------------------

    def _map_states(self, fn) -> None:
        self.states = [None if s is None else fn(s) for s in self.states]
        if self._checkpoint is not None:
            self._checkpoint.states = [None if s is None else fn(s) for s in self._checkpoint.states]

    def _select(self, rows) -> None:
        def progress(p: Progress | None) -> Progress | None:
            return None if p is None else Progress(rows(p.seen), None if p.last_id is None else rows(p.last_id))

        self._map_states(lambda state: state.map(rows))
        self.progress = progress(self.progress)
        if self._checkpoint is not None:
            self._checkpoint.progress = progress(self._checkpoint.progress)
        self._calls = [call.select(rows) for call in self._calls]
