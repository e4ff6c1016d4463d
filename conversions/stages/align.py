"""Every converted mixer learns what its teacher layer does: no layer waits for another, or learns for another.

The loss is the mean over the layers at work of a distance between what the mixer makes of its input and what the
teacher's attention made of the teacher's: `layer_targets.py` says what is compared and how.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...kernels.errors import RnnzooError
from ...zoo.core.configuration import RecurrentConfig
from ...zoo.core.heads import RecurrentForCausalLM
from ...zoo.core.registry import ATTENTION_TYPES
from ...zoo.core.sizes import causal_lm_class
from ..context import StageContext, StageRun
from ..layers import open_layers
from ..recipes import Recipe
from ..teachers import TeacherRef
from .base import Cost, Stage, TrainedStage
from .layer_targets import LOSSES, check_target, mixer_inputs, seen_alone, seen_layers, what_it_does
from .parameters import anything_new, decay_names, parts_of
from .training import StageTrainer, train

__all__ = ["Align", "AlignLayers", "aligned_parameters"]

TARGETS = {
    "outputs": "the output",
    "heads": "the outputs of the heads",
    "matrices": "the matrix softmax(QK^T)",
}
ERRORS = {
    "relative": "squared error over the target's square",
    "mse": "mean squared error",
    "norm": "norm of the error",
}
TRAINED = {
    "new": ("new parameters", "what is new in the mixers"),
    "features": ("new features", "what is new in the mixers but the decay"),
    "mixers": ("mixers", "the mixers"),
}


@dataclass
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
        return TRAINED[self.trains][0]

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {
            "target": tuple(TARGETS),
            "loss": tuple(ERRORS),
            "inputs": ("teacher", "student"),
            "order": ("parallel", "sequential"),
            "trains": tuple(TRAINED),
        }

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if self.weight <= 0:
            raise RnnzooError(f"weight is {self.weight:g}; it must be positive.")

    def check_student(self, recipe: Recipe, teacher: TeacherRef, config: RecurrentConfig, dtype: torch.dtype) -> None:
        super().check_student(recipe, teacher, config, dtype)
        check_target(self.target, recipe.student, config)
        with torch.device("meta"):
            aligned_parameters(self, causal_lm_class(recipe.student)(config))

    def for_student(self, student: str) -> Stage | None:
        """None where nothing in such layers is new, and the stage is to train no more."""
        return self if self.trains == "mixers" or anything_new(student) else None

    def whole_model_because(self, recipe: Recipe) -> str | None:
        if self.inputs != "teacher" or self.order != "parallel":
            return "does not train all layers on the teacher's inputs (inputs: teacher, order: parallel)"
        return "has window dropout" if self.window_dropout else None

    def cost(self) -> Cost:
        return Cost(teacher=1.0, mixers=2.0, gradients=1.0)

    def rates(self) -> list[str]:
        return super().rates() if self.trains == "mixers" else [f"{self.new_lr:g}"]

    def describe(self, recipe: Recipe) -> list[str]:
        inputs = "the teacher's hidden states" if self.inputs == "teacher" else "the student's own hidden states"
        order = ", one layer after the other" if self.order == "sequential" else ""
        weight = "" if self.weight == 1 else f" x {self.weight:g}"
        words = f"each converted layer learns {TARGETS[self.target]} of its teacher layer, from {inputs}{order}"
        return [words, ERRORS[self.loss] + weight, f"trains {TRAINED[self.trains][1]}", *super().describe(recipe)]

    def run(self, context: StageContext, student: Any, stage_run: StageRun) -> tuple[Any, dict[str, Any]]:
        """Trains what is new in the converted mixers, or all of these."""
        rows = context.training().rows(stage_run.rows.start, len(stage_run.rows))
        layers = open_layers(context, student, stage_run)
        for group in layers.groups(rows):
            group.report = train(
                context,
                AlignLayers,
                group.student,
                self,
                stage_run,
                aligned_parameters(self, group.student),
                data=group.rows,
                teacher_model=group.teacher,
                folder=group.folder,
                place=(group.number, group.count),
            )
            if not math.isfinite(group.report.get("loss_last", 0.0)):
                raise RnnzooError(f"The loss of the stage {self.name} is no longer a number; give it lower rates.")
        reports = [report for report in layers.reports() if report]
        if not reports:  # the main process has them
            return layers.student, {}
        tokens, seconds = ([report.get(name, 0) for report in reports] for name in ("tokens", "seconds"))
        means = {name: sum(report[name] for report in reports) / len(reports) for name in ("loss_first", "loss_last")}
        return layers.student, {"tokens": max(tokens), "seconds": round(sum(seconds), 1)} | means


def aligned_parameters(stage: Align, student: RecurrentForCausalLM) -> Callable[[str], bool]:
    """Whether the stage trains the parameter of this name; a layer kept as attention has nothing to learn.

    Raises:
        RnnzooError: it would train nothing.
    """
    chosen = {"new", "mixers"} if stage.trains == "mixers" else {"new"}
    names = {name for name, part in parts_of(student).items() if part in chosen}
    if stage.trains == "features":
        names -= decay_names(student)
    kind = next((kind for kind in student.config.layer_types if kind not in ATTENTION_TYPES), None)
    if kind and not names:
        raise RnnzooError(
            f"nothing in a '{kind}' layer is new for `trains: {stage.trains}` to train; give the stage trains: mixers."
        )
    return names.__contains__


class AlignLayers(StageTrainer):
    """Layers by themselves, all at once or one after the other; or one layer alone, its teacher's inputs given.

    Each layer has a loss, gradients and a limit of these of its own, so that it learns the same whichever layers learn
    beside it: the loss is their sum, and what is reported of it a mean.
    """

    def loss(self, model: nn.Module, ids: Tensor, seq_ids: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        """The sum over the layers at work; hidden (B, T, D): before the one layer that `model` has."""
        stage, student = cast("Align", self.stage), cast("RecurrentForCausalLM", model)
        layers = self._at_work()
        ctx = student.model.make_context(*ids.shape, ids.device, seq_ids=seq_ids)
        if hidden is None:
            seen = seen_layers(self.teacher_model, ids, seq_ids, layers, stage.target)
        else:
            seen = {i: seen_alone(_blocks(self.teacher_model)[i], hidden, ctx, stage.target) for i in layers}
        given = {i: hidden for i, (hidden, _) in seen.items()}
        if stage.inputs == "student":
            given = mixer_inputs(student, ids, seq_ids, layers)
        losses = []
        for i in layers:
            output = what_it_does(_blocks(student)[i].mixer, given[i], ctx, stage.target)
            losses.append(LOSSES[stage.loss](output, seen[i][1]))
        return stage.weight * torch.stack(losses).sum()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs) / len(self._at_work())

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Layer by layer; returns the norm of all gradients together, before."""
        limit, blocks = self.args.max_grad_norm, _blocks(self.model)
        norms = [nn.utils.clip_grad_norm_(blocks[i].mixer.parameters(), limit) for i in self._at_work()]
        whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        return torch.linalg.vector_norm(torch.stack(whole))

    def _trained(self) -> list[int]:
        """Layers whose mixers this stage trains."""
        return [i for i, block in _blocks(self.model).items() if any(p.requires_grad for p in block.mixer.parameters())]

    def _at_work(self) -> list[int]:
        """Layers that learn in the step under way."""
        trained = self._trained()
        if cast("Align", self.stage).order == "parallel":
            return trained
        count, steps = len(trained), max(self.state.max_steps, 1)
        first, beyond = (step * count // steps for step in (self.state.global_step, self.state.global_step + 1))
        return trained[first : max(first + 1, beyond)]

    def cycle(self, step: int, steps: int) -> tuple[int, int]:
        """One after the other, each layer has the whole of the schedule."""
        if cast("Align", self.stage).order == "parallel":
            return 0, steps
        count = len(self._trained())
        layer = step * count // steps
        begin, end = (-(-number * steps // count) for number in (layer, layer + 1))
        return begin, max(end, step + 1)


def _blocks(model: Any) -> dict[int, Any]:
    """The layers that a model has, by number."""
    return {int(name): block for name, block in model.model.layers.named_children()}
