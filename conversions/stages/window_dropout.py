"""Window dropout: in training, some rows see less of a layer's exact window, so that the linear state must carry text.

A layer with both tends to leave its state unused (arXiv 2510.05901, whose remedy this is: "scheduled sliding-window
dropout"). Here a row loses with probability `window_dropout` either window and sinks of all layers, so that only
the linear branch works, or a random part of every window's length, one as likely as the other.

The choice depends on the seed, the step and the row's tokens alone: a run that was stopped, or divided among processes
otherwise, chooses the same.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...kernels.errors import RnnzooError
from ...zoo.core.mixer import Mixer
from ...zoo.core.registry import mixer_class

__all__ = ["check_window_dropout", "drops_windows", "kept_share", "reduced_windows"]

WINDOW, LINEAR = "window", "linear"


def drops_windows(mixer: type[Mixer] | Mixer) -> bool:
    """Does such a layer have a window that it can do without?"""
    return {WINDOW, LINEAR} <= set(mixer.branches)


def check_window_dropout(student: str) -> None:
    """Refuses a student without windows that could be dropped.

    Raises:
        RnnzooError: names it.
    """
    if not drops_windows(mixer_class(student)):
        raise RnnzooError(
            f"window_dropout needs layers with an exact window beside a linear state, which '{student}' layers do not "
            "have; leave it out."
        )


def kept_share(probability: float, seed: int, step: int, ids: Tensor) -> float:
    """How much of the windows the rows ids (B, T) see at `step`: 1 for all, 0 for none."""
    if not probability:
        return 1.0
    digest = hashlib.sha256(f"{seed} {step} ".encode() + ids.to("cpu", torch.int64).numpy().tobytes()).digest()
    drop, whole, part = (int.from_bytes(digest[8 * i : 8 * i + 8], "big") / 2**64 for i in range(3))
    if drop >= probability:
        return 1.0
    return 0.0 if whole < 0.5 else part


@contextlib.contextmanager
def reduced_windows(student: nn.Module, share: float) -> Iterator[None]:
    """Within the block, layers with a window and a linear state see `share` of the window, but always the token."""
    with contextlib.ExitStack() as stack:
        for mixer in student.modules() if share < 1 else ():
            if not isinstance(mixer, Mixer) or not drops_windows(mixer):
                continue
            stack.enter_context(mixer.shortened(share) if share else mixer.only(LINEAR))
        yield
