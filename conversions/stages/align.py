"""Every converted mixer learns what its teacher layer does: no layer waits for another, or learns for another.

The loss is the mean over the layers at work of a distance between what the mixer makes of its input and what the
teacher's attention made of the teacher's: `layer_targets.py` says what is compared and how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...kernels.errors import RnnzooError
from ...zoo.core.registry import ATTENTION_TYPES
from .layer_targets import LOSSES, mixer_inputs, seen_layers, what_it_does
from .parameters import decay_names, parts_of
from .training import StageTrainer

if TYPE_CHECKING:
    from ...zoo.core.heads import RecurrentForCausalLM
    from ..job import Job, Part
    from ..recipes.stages import Align

__all__ = ["AlignLayers", "aligned_parameters", "run"]


def run(job: Job, stage: Align, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """Trains what is new in the converted mixers, or all of these."""
    return student, job.train(AlignLayers, student, stage, part, aligned_parameters(stage, student))


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
    """Layers by themselves, all at once or one after the other."""

    def loss(self, model: nn.Module, ids: Tensor, seq_ids: Tensor | None) -> Tensor:
        stage, student = cast("Align", self.stage), cast("RecurrentForCausalLM", model)
        layers = self._at_work()
        seen = seen_layers(self.twin, ids, seq_ids, layers, stage.target)
        given = {i: hidden for i, (hidden, _) in seen.items()}
        if stage.inputs == "student":
            given = mixer_inputs(student, ids, seq_ids, layers)
        ctx = student.model.make_context(*ids.shape, ids.device, seq_ids=seq_ids)
        losses = []
        for i in layers:
            said = what_it_does(student.model.layers[i].mixer, given[i], ctx, stage.target)
            losses.append(LOSSES[stage.loss](said, seen[i][1]))
        return stage.weight * torch.stack(losses).mean()

    def _trained(self) -> list[int]:
        """Layers whose mixers this stage trains."""
        blocks = cast("RecurrentForCausalLM", self.model).model.layers
        return [i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.mixer.parameters())]

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
