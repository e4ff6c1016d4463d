"""The kinds of stages that a recipe may name, each in a file of its own: its settings, and what it does.

calibrate   closed forms, no training            train    the whole model, on the training text
allocate    windows of a trained student         extend   the same on longer rows, the state passed on
align       every layer by itself                sft      chats                     dpo   preferences
"""

from __future__ import annotations

from typing import TypeVar

from .align import Align
from .allocate import Allocate
from .base import Stage, TrainedStage
from .calibrate import Calibrate
from .dpo import Dpo
from .extend import Extend
from .sft import Sft
from .train import Train

__all__ = ["KINDS", "Stage", "TrainedStage", "register_stage"]

KINDS: dict[str, type[Stage]] = {
    "calibrate": Calibrate,
    "allocate": Allocate,
    "align": Align,
    "train": Train,
    "extend": Extend,
    "sft": Sft,
    "dpo": Dpo,
}

S = TypeVar("S", bound=type[Stage])


def register_stage(cls: S) -> S:
    """Adds a kind to the table, under the default of its field `kind`; a decorator for kinds that live elsewhere."""
    KINDS[cls.kind] = cls
    return cls
