"""The kinds of stages, and the settings of each. How they run is in `conversions/stages/<kind>.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...kernels.errors import RnnzooError
from .end_to_end import Distilled, Dpo, EndToEnd, Extend, OwnData, Sft, Train
from .stage_base import Stage, TrainedStage

__all__ = [
    "KINDS",
    "WINDOW_PARTS",
    "Align",
    "Allocate",
    "Calibrate",
    "Distilled",
    "Dpo",
    "EndToEnd",
    "Extend",
    "OwnData",
    "Sft",
    "Stage",
    "Train",
    "TrainedStage",
]


@dataclasses.dataclass
class Measuring(Stage):
    """What stages have that divide the state budget by measured error; see `fit/allocation.py`.

    Attributes:
        feature_widths: candidates for the width of a layer's linear state, 0 besides; none: the student's own in all
            layers, so that only the windows are chosen.
        budget_context: tokens at which the budget pays for a layer of full attention, which then is a candidate too; 0:
            layers are kept only where `keep` says so, outside of the budget.
    """

    feature_widths: list[int] = dataclasses.field(default_factory=list)
    budget_context: int = 0

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if (wrong := [width for width in self.feature_widths if width < 0]) or self.budget_context < 0:
            value = wrong[0] if wrong else self.budget_context
            raise RnnzooError(f"feature_widths and budget_context cannot be negative; one is {value}.")
        if self.feature_widths and recipe.student_options.get("feature_map") != "prototype":
            raise RnnzooError("feature_widths are fitted for `feature_map: prototype`; student_options must have it.")
        if (self.feature_widths or self.budget_context) and recipe.state_budget is None:
            raise RnnzooError("feature_widths and budget_context divide a budget; give the recipe a state_budget.")


PARTS = ("windows", "features", "decay", "values", "scale", "output")
WINDOW_PARTS = ("windows", "features")


@dataclasses.dataclass
class Calibrate(Measuring):
    """Closed form, no training: reads the recipe's `calibration_tokens`.

    Attributes:
        parts: of PARTS, which run in that order; none: those that the student has (`chosen`). Windows and features are
            for hedgehog layers, which need nothing else (on SmolLM2-135M, 8,000 tokens, a refit of the output raises
            their perplexity from 39 to 54); the others are for all, see `fit/closed_form.py`. "values" has to be
            asked for, and passes over layers that are not linear in their values.
        ridge: how strongly the output is drawn to the weight that it replaces; 0: chosen for each layer by its error on
            text that it was not fitted to.
        correct: share of what the layers before left that a layer mends, from 0 to 1.
        weighting: of the tokens: "norm", by 1 / |h|^2 of the teacher's stream, as its norms see errors; "gradient", by
            the mean squared gradient of its loss; or "none".
    """

    kind: str = "calibrate"
    parts: list[str] = dataclasses.field(default_factory=list)
    ridge: float = 0.0
    correct: float = 0.5
    weighting: str = "norm"

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"weighting": ("norm", "gradient", "none")}

    def chosen(self, recipe: Any) -> list[str]:
        """The parts of a recipe's stage, in their order."""
        windowed = recipe.student == "hedgehog"
        usual = WINDOW_PARTS if windowed else ("decay", "scale", "output")
        chosen = [part for part in PARTS if part in (self.parts or usual)]
        return chosen if recipe.state_budget is not None or self.parts else [p for p in chosen if p != "windows"]

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise RnnzooError(f"parts has {unknown[0]!r}; expected some of {', '.join(PARTS)}.")
        if wrong := [part for part in self.parts if part in WINDOW_PARTS and recipe.student != "hedgehog"]:
            raise RnnzooError(f"the part {wrong[0]} is for hedgehog layers; the student is {recipe.student}.")
        if "windows" in self.parts and recipe.state_budget is None:
            raise RnnzooError("the part windows divides a budget; give the recipe a state_budget.")
        if self.ridge < 0:
            raise RnnzooError(f"ridge is {self.ridge:g}; it cannot be negative.")
        if not 0 <= self.correct <= 1:
            raise RnnzooError(f"correct is {self.correct:g}; it must lie between 0 and 1.")


@dataclasses.dataclass
class Allocate(Stage):
    """The windows of a trained student measured again: tokens move to the heads where they now remove more error.

    Weights and feature widths stay, and so does the state budget; reads the recipe's `calibration_tokens`.
    """

    kind: str = "allocate"

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        options = recipe.student_options
        if recipe.student != "hedgehog" or options.get("feature_map") != "prototype" or recipe.state_budget is None:
            raise RnnzooError(
                "an allocate stage is for hedgehog layers with `feature_map: prototype` and a state_budget."
            )


@dataclasses.dataclass
class Align(TrainedStage):
    """Each mixer learns what its teacher layer does, on its own; the loss is a mean over the layers.

    Attributes:
        target: the layers' "outputs"; the outputs of their "heads", before the output projection; or their "matrices",
            with which values are summed (softmax(QK^T) of attention).
        loss: of the difference: "relative", its square over the target's; "mse", its mean square; "norm", the mean over
            tokens of ||.||_2 / sqrt(width), of matrices the mean over heads of ||.||_F.
        weight: factor of the loss.
        inputs: of the mixers: hidden states of the "teacher", or those that the "student" makes itself; no gradient
            goes from a layer into the one before.
        order: all layers in "parallel", or "sequential", one after the other with an equal part of the steps each.
        trains: what is "new" in the converted "mixers", or all of them; "features": what is new, but no decay.
    """

    kind: str = "align"
    target: str = "outputs"
    loss: str = "relative"
    weight: float = 1.0
    inputs: str = "teacher"
    order: str = "parallel"
    trains: str = "new"

    def trainable(self) -> str:
        return {"new": "new parameters", "features": "new features", "mixers": "mixers"}[self.trains]

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {
            "target": ("matrices", "heads", "outputs"),
            "loss": ("relative", "mse", "norm"),
            "inputs": ("teacher", "student"),
            "order": ("parallel", "sequential"),
            "trains": ("new", "features", "mixers"),
        }

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if self.weight <= 0:
            raise RnnzooError(f"weight is {self.weight:g}; it must be positive.")


KINDS: dict[str, type[Stage]] = {cls.kind: cls for cls in (Calibrate, Allocate, Align, Train, Extend, Sft, Dpo)}
