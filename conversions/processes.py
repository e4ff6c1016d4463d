"""One conversion or training by several processes, as torchrun and `accelerate launch` start them.

The main process checks, makes data, writes and prints; the others wait, and read what it has written. All take part in
the stages that train: rows are dealt out by rank, so that a step sees the same rows however many processes there are.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from ..kernels.errors import RnnzooError

__all__ = ["Processes", "rows_per_step"]

T = TypeVar("T")
# The others wait while the main process makes data or calibrates, which may take hours.
TIMEOUT = datetime.timedelta(days=7)


class Processes:
    """The processes of this run: one, where nothing has started more.

    Attributes:
        main: whether this is the one that writes. count: how many there are. index: which this is.
    """

    def __init__(self) -> None:
        if PartialState._shared_state == {}:
            several = torch.distributed.is_torchelastic_launched()
            PartialState(cpu=not torch.cuda.is_available(), **({"timeout": TIMEOUT} if several else {}))
        state = PartialState()
        self.index, self.count, self.main = state.process_index, state.num_processes, state.is_main_process

    def first(self, work: Callable[[], T]) -> T:
        """`work` in the main process, then in the others; if it fails there, the others exit silently."""
        if self.main:
            return self._told(work)
        self._hear()
        return work()

    def only(self, work: Callable[[], T]) -> T | None:
        """`work` in the main process, while the others wait; to them it gives None."""
        return self._told(work) if self.main else self._hear()

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def end(self) -> None:
        """Waits for all, and takes their connections down: a process that just leaves may abort the others."""
        self.wait()
        if self.count > 1:
            torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)

    def _told(self, work: Callable[[], T]) -> T:
        try:
            done = work()
        except Exception:
            self._send(False)
            raise
        self._send(True)
        return done

    def _hear(self) -> None:
        if not self._send(None):
            raise SystemExit(1)  # the main process says why

    def _send(self, well: bool | None) -> Any:
        if self.count == 1:
            return True
        box = [well]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]


def rows_per_step(batch_tokens: int, seq_len: int, rows: int, count: int) -> int:
    """Rows of an optimiser step, of all `count` processes together: `batch_tokens`, or all `rows` if these are fewer.

    Raises:
        RnnzooError: they cannot be divided among the processes.
    """
    per_step = max(1, min(batch_tokens // seq_len, rows))
    if per_step % count:
        raise RnnzooError(
            f"A step of {per_step} sequences of {seq_len} tokens cannot be divided among {count} processes; choose "
            f"another number of processes, or --batch-tokens {count * seq_len * -(-per_step // count)}, with text for "
            "at least one step."
        )
    return per_step
