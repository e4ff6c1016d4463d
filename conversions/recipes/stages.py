"""The kinds of stages, and the settings of each. How they run is in `conversions/stages/<kind>.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...kernels.errors import RnnzooError

__all__ = ["KINDS", "Align", "Calibrate", "Stage", "Train", "TrainedStage"]


@dataclasses.dataclass
class Stage:
    """What every stage has.

    Attributes:
        name: its folder and its line in the results. kind: one of KINDS.
        share: of the recipe's training tokens; 0 for stages that do not train.
    """

    name: str
    kind: str = ""
    share: float = 0.0

    def trainable(self) -> str:
        """What it trains, in a word."""
        return "nothing"

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Settings that are one of a few words, and these words."""
        return {}

    def check(self, recipe: Any) -> None:
        """Refuses settings that do not fit each other or the recipe.

        Raises:
            RnnzooError: says what, without the name of the stage, which the caller puts before it.
        """
        if not 0 <= self.share <= 1:
            raise RnnzooError(f"share is {self.share:g}; it must lie between 0 and 1.")
        for name, allowed in self.choices().items():
            if getattr(self, name) not in allowed:
                raise RnnzooError(f"{name} is {getattr(self, name)!r}; expected one of {allowed}.")


@dataclasses.dataclass
class Calibrate(Stage):
    """Closed form, no training: reads the recipe's `calibration_tokens`."""

    kind: str = "calibrate"

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if recipe.student != "hedgehog":
            raise RnnzooError(f"a calibrate stage is for hedgehog layers; the student is {recipe.student}.")


@dataclasses.dataclass
class TrainedStage(Stage):
    """What stages with an optimiser have: AdamW without weight decay.

    Attributes:
        lr: peak learning rate of matrices that came from the teacher. new_lr: of parameters that did not.
        schedule: "cosine" or "constant", after `warmup` (share of the steps).
        beta2: of AdamW; its beta1 is 0.9.
    """

    lr: float = 1e-4
    new_lr: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    beta2: float = 0.95

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"schedule": ("cosine", "constant")}

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if not 0 <= self.warmup <= 1:
            raise RnnzooError(f"warmup is {self.warmup:g}; it must lie between 0 and 1.")


@dataclasses.dataclass
class Align(TrainedStage):
    """Each mixer learns its teacher layer's output from the teacher's own inputs."""

    kind: str = "align"

    def trainable(self) -> str:
        return "new parameters"


@dataclasses.dataclass
class Train(TrainedStage):
    """End to end.

    Attributes:
        trains: "mixers" or "all".
        kl, ce: weights of KL(teacher || student) and of cross-entropy, both per token.
        labels: of the cross-entropy: "text", or "teacher" for the teacher's most likely token.
        z_loss: weight of logsumexp^2.
    """

    kind: str = "train"
    trains: str = "mixers"
    kl: float = 1.0
    ce: float = 0.0
    labels: str = "text"
    z_loss: float = 0.0

    def trainable(self) -> str:
        return self.trains

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"trains": ("mixers", "all"), "labels": ("text", "teacher")}


KINDS: dict[str, type[Stage]] = {cls.kind: cls for cls in (Calibrate, Align, Train)}
