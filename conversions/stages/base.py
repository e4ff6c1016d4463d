"""What a kind of stage is: its settings, what it checks and reads, what it costs, and what it does.

A kind is one file: a dataclass derived from `Stage` (or `TrainedStage`, or one of the classes on these), whose fields
are the keys that a recipe may give it, and whose `run` does the work; `stages/__init__.py` has the table. Nothing
outside of that file asks what kind a stage is. A conversion calls, in this order,

    check                    when the recipe is read: settings against each other and against the recipe
    for_student              where the user has asked for another student than the recipe's
    check_student            settings against teacher and student, whose configurations are known then
    check_processes          whether its steps can be dealt out
    check_inputs             what it reads besides the text; what identifies that becomes part of the run's request
    prepare                  packs its rows before the first stage, so that unusable text stops a run before it began
    takes                    whether there is anything to do
    run                      the work
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...kernels.errors import RnnzooError
from ...zoo.core.configuration import RecurrentConfig
from ..context import StageContext, StageRun
from ..processes import rows_per_step
from ..recipes import Recipe
from ..teachers import TeacherRef
from .window_dropout import check_window_dropout

__all__ = ["Cost", "Stage", "TrainedStage"]

STEPS = {
    "each": "",
    "last": "at the last step",
    "up to half": "until half of the layers are converted",
    "from half": "from half of the layers converted on",
}


@dataclass(frozen=True)
class Cost:
    """Work for one token of a stage's text, in forward passes; a backward pass is two, one of them for the weights.

    Attributes:
        teacher: passes of the teacher. student: of the student, gradients of its weights apart. mixers: likewise of the
            converted mixers alone. gradients: of the weights that are trained.
    """

    teacher: float = 0.0
    student: float = 0.0
    mixers: float = 0.0
    gradients: float = 0.0


@dataclass
class Stage:
    """What every stage has.

    Attributes:
        name: its folder and its line in the results. kind: its name in the table of kinds.
        share: of the recipe's training tokens; 0 for stages that do not train.
        steps: of a recipe that converts step by step, those that the stage is part of: "each", the "last", those "up to
            half" of the layers converted (the first step among them in any case), or "from half" on (the last as well).
    """

    name: str
    kind: str = ""
    share: float = 0.0
    steps: str = "each"

    own_rows: ClassVar[bool] = False  # whether it reads something else than rows of the recipe's training text
    together: ClassVar[bool] = False  # whether all processes work on it; else the main one does, and the others wait

    # Checks --------------------------------------------------------------------------------------------------------

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Settings that are one of a few words, and these words."""
        return {"steps": tuple(STEPS)}

    def check(self, recipe: Recipe) -> None:
        """Refuses settings that do not fit each other or the recipe.

        Raises:
            RnnzooError: says what, without the name of the stage, which the caller puts before it. So do all checks.
        """
        if not 0 <= self.share <= 1:
            raise RnnzooError(f"share is {self.share:g}; it must lie between 0 and 1.")
        if self.own_rows and self.name in ("calibration", "training", "evaluation"):
            raise RnnzooError(f"{self.name} is the name of a part of the text; name the stage differently.")
        for name, allowed in self.choices().items():
            if getattr(self, name) not in allowed:
                raise RnnzooError(f"{name} is {getattr(self, name)!r}; expected one of {allowed}.")

    def for_student(self, student: str) -> Stage | None:
        """The stage for this mixer in place of the recipe's own; None: there is nothing left of it."""
        return self

    def check_student(self, recipe: Recipe, teacher: TeacherRef, config: RecurrentConfig, dtype: torch.dtype) -> None:
        """Refuses what the student's layers cannot meet.

        Args:
            config: of the student. dtype: of the weights that will be saved.
        """

    def check_processes(self, recipe: Recipe, tokens: int, count: int) -> None:
        """Refuses steps that cannot be divided among `count` processes, where the stage trains on `tokens`."""

    def check_inputs(
        self, recipe: Recipe, teacher: TeacherRef, chat_data: list[str] | None, look: bool
    ) -> dict[str, Any]:
        """Looks at what it reads besides the text; returns what identifies it: {what: identity}, {} for nothing.

        Args:
            look: at data as well, which a run that goes on has in its folder already.
        """
        return {}

    def reads_chat_data(self) -> bool:
        """Whether it reads what `--chat-data` gives."""
        return False

    def whole_model_because(self, recipe: Recipe) -> str | None:
        """Why the whole model has to be in memory, as the end of a sentence; None: a layer at a time will do."""
        return "needs the whole model"

    # Costs ---------------------------------------------------------------------------------------------------------

    def row_length(self, recipe: Recipe) -> int:
        """Tokens of a row that it reads."""
        return recipe.seq_len

    def tokens_read(self, recipe: Recipe, chat_data: list[str] | None = None) -> int | None:
        """Tokens that it works on, for a plan; None: not known."""
        return int(recipe.tokens * self.share)

    def cost(self) -> Cost:
        """What a token costs."""
        return Cost()

    def trainable(self) -> str:
        """What it trains, in a word: "nothing", "all", "mixers", or what in these."""
        return "nothing"

    def describe(self, recipe: Recipe) -> list[str]:
        """Parts of one line about it, for the page of recipes."""
        return [STEPS[self.steps]] if STEPS[self.steps] else []

    # State ---------------------------------------------------------------------------------------------------------

    def divides_budget(self, recipe: Recipe) -> bool:
        """Whether it divides the recipe's state budget among the layers."""
        return False

    def divide_budget(self, context: StageContext, types: list[str]) -> dict[str, Any]:
        """Where the budget of a student with mixers `types` would go, as `plan` shows it."""
        raise NotImplementedError

    def for_ranking(self) -> Stage | None:
        """The stage for a student whose layers stand in for their own layer alone; None: only after a ranking."""
        return None

    # Work ----------------------------------------------------------------------------------------------------------

    def prepare(self, context: StageContext) -> None:
        """Makes the rows that it will read."""

    def takes(self, recipe: Recipe, rows: int) -> bool:
        """Whether there is something to do, where `rows` of the text are its share."""
        return True

    def run(self, context: StageContext, student: Any, stage_run: StageRun) -> tuple[Any, dict[str, Any]]:
        """Does the work; a stage that was stopped in it goes on from what is in `context.folder / stage_run.name`.

        Args:
            student: as the stage before left it, in float32; may be changed.
        Returns:
            The student after it, in float32, the same object or another; and what run.json and results.json record:
            a stage that trains `tokens`, `seconds`, `loss_first`, `loss_last`, others at least `tokens` (read, not
            trained on) and `seconds`.
        """
        raise NotImplementedError


@dataclass
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

    together: ClassVar[bool] = True

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"schedule": ("cosine", "linear", "constant")}

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        for name in ("warmup", "window_dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise RnnzooError(f"{name} is {getattr(self, name):g}; it must lie between 0 and 1.")
        for name in ("lr", "new_lr", "min_lr", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise RnnzooError(f"{name} is {getattr(self, name):g}; it cannot be negative.")

    def check_student(self, recipe: Recipe, teacher: TeacherRef, config: RecurrentConfig, dtype: torch.dtype) -> None:
        if self.window_dropout:
            check_window_dropout(recipe.student)

    def check_processes(self, recipe: Recipe, tokens: int, count: int) -> None:
        if tokens:
            length = self.row_length(recipe)
            rows_per_step(recipe.batch_tokens, length, max(1, tokens // length), count)

    def prepare(self, context: StageContext) -> None:
        if context.recipe.tokens:
            context.training()

    def takes(self, recipe: Recipe, rows: int) -> bool:
        return rows > 0

    def rate(self, what: str) -> float:
        """Peak learning rate of parameters that are "new", of the "mixers", of kept "attention", or of the "rest"."""
        return self.new_lr if what == "new" else self.lr

    def rates(self) -> list[str]:
        """The same in words, of those that differ."""
        return [f"{self.lr:g}"] + ([f"{self.new_lr:g} of what is new"] if self.new_lr != self.lr else [])

    def describe(self, recipe: Recipe) -> list[str]:
        course = "constant" if self.schedule == "constant" else f"{self.schedule} to {self.min_lr:g}"
        dropout = [f"window dropout {self.window_dropout:g}"] if self.window_dropout else []
        return [f"learning rate {', '.join(self.rates())}, {course}", *dropout, *super().describe(recipe)]
