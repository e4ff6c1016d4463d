"""Adapters of low rank (Hu et al. 2021) on the converted mixers' matrices, by peft, for the time of one stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...kernels.errors import RnnzooError
from ...zoo.core.registry import ATTENTION_TYPES
from .parameters import parts_of

if TYPE_CHECKING:
    from ..recipes.stages import EndToEnd

__all__ = ["check_lora", "lora_targets", "trainable"]


@contextlib.contextmanager
def trainable(student: Any, stage: EndToEnd, seed: int) -> Iterator[Callable[[str], bool]]:
    """Which parameters of the student a stage trains, by name.

    With LoRA, the student has its adapters inside the block. They are merged into the matrices at its end, and the
    student is then of the same shape as before.

    Raises:
        RnnzooError: as `check_lora`.
    """
    if stage.trains != "lora":
        kept = ("rest", "attention") if stage.trains == "converted" else ("rest",)
        parts = parts_of(student)
        yield lambda name: stage.trains == "all" or parts[name] not in kept
        return
    check_lora(stage, student)
    from peft import LoraConfig, LoraModel

    torch.manual_seed(seed)  # of the adapters' first matrices; the second ones are zero
    config = LoraConfig(
        r=stage.lora_rank, lora_alpha=stage.lora_alpha, lora_dropout=0.0, target_modules=lora_targets(student, stage)
    )
    adapters = LoraModel(student, config, "default")
    yield lambda name: ".lora_" in name
    adapters.merge_and_unload()


def lora_targets(student: Any, stage: EndToEnd) -> list[str]:
    """Names of the linear layers in the student's converted mixers that have adapters."""
    return [name for name in _linear_layers(student) if name.rsplit(".", 1)[-1] in stage.lora_targets]


def check_lora(stage: EndToEnd, student: Any) -> None:
    """Refuses a stage with LoRA that this student cannot have; its weights may be on the meta device.

    Raises:
        RnnzooError: peft is missing, or a target is in none of the converted mixers.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise RnnzooError("`trains: lora` needs peft: pip install 'rnnzoo[train]'.") from error
    known = dict.fromkeys(name.rsplit(".", 1)[-1] for name in _linear_layers(student))
    if missing := [name for name in stage.lora_targets if name not in known]:
        raise RnnzooError(
            f"the converted layers have no matrix {missing[0]!r} for LoRA; lora_targets may name {', '.join(known)}."
        )


def _linear_layers(student: Any) -> list[str]:
    layers = [
        f"model.layers.{number}.mixer"
        for number, kind in enumerate(student.config.layer_types)
        if kind not in ATTENTION_TYPES
    ]
    return [
        f"{layer}.{name}"
        for layer in layers
        for name, module in student.get_submodule(layer).named_modules()
        if isinstance(module, nn.Linear)
    ]
