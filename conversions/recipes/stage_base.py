"""What every stage has, and what every stage with an optimiser has."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ...kernels.errors import RnnzooError

__all__ = ["Stage", "TrainedStage"]


@dataclasses.dataclass
class Stage:
    """What every stage has.

    Attributes:
        name: its folder and its line in the results. kind: one of KINDS.
        share: of the recipe's training tokens; 0 for stages that do not train.
        steps: of a recipe that converts step by step, those that the stage is part of: "each", the "last", those "up to
            half" of the layers converted (the first step among them in any case), or "from half" on (the last as well).
    """

    name: str
    kind: str = ""
    share: float = 0.0
    steps: str = "each"
    own_rows: ClassVar[bool] = False  # whether it reads something else than rows of the recipe's training text

    def row_length(self, recipe: Any) -> int:
        """Tokens of a row that it reads."""
        return recipe.seq_len

    def trainable(self) -> str:
        """What it trains, in a word."""
        return "nothing"

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Settings that are one of a few words, and these words."""
        return {"steps": ("each", "last", "up to half", "from half")}

    def check(self, recipe: Any) -> None:
        """Refuses settings that do not fit each other or the recipe.

        Raises:
            RnnzooError: says what, without the name of the stage, which the caller puts before it.
        """
        if not 0 <= self.share <= 1:
            raise RnnzooError(f"share is {self.share:g}; it must lie between 0 and 1.")
        if self.own_rows and self.name in ("calibration", "training", "evaluation"):
            raise RnnzooError(f"{self.name} is the name of a part of the text; name the stage differently.")
        for name, allowed in self.choices().items():
            if getattr(self, name) not in allowed:
                raise RnnzooError(f"{name} is {getattr(self, name)!r}; expected one of {allowed}.")


@dataclasses.dataclass
class TrainedStage(Stage):
    """What stages with an optimiser have, which is AdamW.

    Attributes:
        lr: peak learning rate of matrices that came from the teacher. new_lr: of parameters that did not.
        schedule: "cosine", "linear" or "constant", after `warmup` (share of the steps).
        min_lr: where cosine and linear schedules end.
        beta1, beta2, weight_decay: of AdamW. max_grad_norm: gradients of a step are scaled to this norm at most.
        window_dropout: probability, for every row, that a layer with an exact window beside its linear state loses the
            window or a part of it, so that the state does not go unused; see `stages/window_dropout.py`.
    """

    lr: float = 1e-4
    new_lr: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    window_dropout: float = 0.0

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"schedule": ("cosine", "linear", "constant")}

    def takes(self, recipe: Any, rows: int) -> bool:
        """Whether it has something to train on, where `rows` of the text are its share."""
        return rows > 0

    def rate(self, what: str) -> float:
        """Peak learning rate of parameters that are "new", of the "mixers", of kept "attention", or of the "rest"."""
        return self.new_lr if what == "new" else self.lr

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        for name in ("warmup", "window_dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise RnnzooError(f"{name} is {getattr(self, name):g}; it must lie between 0 and 1.")
        for name in ("lr", "new_lr", "min_lr", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise RnnzooError(f"{name} is {getattr(self, name):g}; it cannot be negative.")
