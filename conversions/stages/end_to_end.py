"""What stages have in common that train the whole model: which parameters, adapters of low rank among them (peft)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...kernels.errors import RnnzooError
from ...zoo.core.configuration import RecurrentConfig
from ...zoo.core.registry import ATTENTION_TYPES
from ...zoo.core.sizes import causal_lm_class
from ..recipes import Recipe
from ..teachers import TeacherRef
from .base import Cost, TrainedStage
from .parameters import parts_of

__all__ = ["EndToEnd", "lora_targets", "trainable"]

TRAINED = {"mixers": "the mixers", "converted": "the mixers of converted layers", "all": "all parameters"}


@dataclass
class EndToEnd(TrainedStage):
    """What stages have that train the whole model, not layers on their own.

    Attributes:
        trains: "mixers", those of "converted" layers alone, "all", or "lora": adapters of low rank (Hu et al. 2021) on
            the converted mixers, merged into their matrices when the stage ends; nothing else moves.
        lora_rank, lora_alpha: of the adapters, which add alpha / rank * B A. lora_targets: names of linear layers.
        rest_lr: of MLPs, norms and embeddings, where they are trained. attention_lr: of layers kept as attention. None:
            `lr`.
        epochs: how often each row is read, every time in another order. A stage on the training text keeps its share of
            the tokens all the same, so its text is so many times shorter.
    """

    trains: str = "mixers"
    rest_lr: float | None = None
    attention_lr: float | None = None
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    epochs: int = 1

    def asks_teacher(self) -> bool:
        """Whether the loss needs the teacher's predictions."""
        return False

    def cost(self) -> Cost:
        return Cost(teacher=float(self.asks_teacher()), student=2.0, gradients=1.0)

    def trainable(self) -> str:
        return f"LoRA of rank {self.lora_rank}" if self.trains == "lora" else self.trains

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"trains": ("mixers", "converted", "all", "lora")}

    def rate(self, what: str) -> float:
        rate = {"attention": self.attention_lr, "rest": self.rest_lr}.get(what)
        return super().rate(what) if rate is None else rate

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if self.epochs < 1:
            raise RnnzooError(f"epochs is {self.epochs}; it must be 1 or more.")
        if self.trains == "lora" and (self.lora_rank < 1 or not self.lora_targets):
            raise RnnzooError("LoRA needs a lora_rank of 1 or more and at least one name in lora_targets.")

    def check_student(self, recipe: Recipe, teacher: TeacherRef, config: RecurrentConfig, dtype: torch.dtype) -> None:
        super().check_student(recipe, teacher, config, dtype)
        if self.trains == "lora":
            with torch.device("meta"):
                check_lora(self, causal_lm_class(recipe.student)(config))

    def rates(self) -> list[str]:
        others = {"kept attention": self.attention_lr, "rest": self.rest_lr}
        return super().rates() + [f"{rate:g} of the {what}" for what, rate in others.items() if rate is not None]

    def learns_from(self) -> list[str]:
        """Rows and losses, in words."""
        raise NotImplementedError

    def describe(self, recipe: Recipe) -> list[str]:
        who = TRAINED.get(self.trains)
        if who is None:
            targets = ", ".join(self.lora_targets)
            who = f"LoRA of rank {self.lora_rank} and alpha {self.lora_alpha:g} on {targets}"
        return [f"{who}, end to end", *self.learns_from(), *super().describe(recipe)]


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
