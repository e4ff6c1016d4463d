"""The windows of a trained student, measured and chosen again; see `fit/trained_errors.py` and `fit/allocation.py`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ...kernels.errors import RnnzooError
from ...zoo.core.registry import mixer_class
from ..context import StageContext, StageRun
from ..fit.trained_errors import measure_trained
from ..recipes import Recipe
from ..student import budget_of
from .base import Cost, Stage

__all__ = ["Allocate"]


@dataclass
class Allocate(Stage):
    """The windows of a trained student measured again: tokens move to the heads where they now remove more error.

    Weights and feature widths stay, and so does the state budget; reads the recipe's `calibration_tokens`.
    """

    kind: str = "allocate"

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if recipe.state_budget is None:
            raise RnnzooError("an allocate stage divides a budget; give the recipe a state_budget.")
        if reason := mixer_class(recipe.student).fixed_widths_because(recipe.student_options):
            raise RnnzooError(f"an allocate stage measures windows beside linear states, but {reason}.")

    def for_student(self, student: str) -> Stage | None:
        return self if mixer_class(student).divides_budget else None

    def tokens_read(self, recipe: Recipe, chat_data: list[str] | None = None) -> int | None:
        return recipe.calibration_tokens

    def cost(self) -> Cost:
        return Cost(teacher=3.0)

    def describe(self, recipe: Recipe) -> list[str]:
        return [
            "windows move to where they remove the most error in the trained student; "
            f"{recipe.calibration_tokens:,} tokens are read once",
            *super().describe(recipe),
        ]

    def prepare(self, context: StageContext) -> None:
        context.calibration()

    def run(self, context: StageContext, student: Any, stage_run: StageRun) -> tuple[Any, dict[str, Any]]:
        """Other windows in as many bytes, the same weights."""
        started = time.monotonic()
        data = context.calibration()
        report = lambda done, total: context.progress(stage_run.name, done, total, {})  # noqa: E731
        measured = measure_trained(context.teacher_model, student.eval(), data, context.seed, report)
        budget = budget_of(context.teacher, context.recipe, context.dtype)
        config, record = budget.divide_again(student.config, measured)
        moved = context.rebuilt(config, student)
        return moved, {
            "tokens": data.num_tokens,
            "seconds": round(time.monotonic() - started, 1),
            "allocation": record,
        }
