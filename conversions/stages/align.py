"""Every converted mixer on its teacher layer's inputs.

The loss is the mean over layers of ||mixer(x) - attention(x)||^2 / ||attention(x)||^2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .training import StageTrainer, is_new

if TYPE_CHECKING:
    from ..job import Job, Part
    from ..recipes.stages import Align

__all__ = ["AlignLayers", "run"]


def run(job: Job, stage: Align, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """Trains what is new in the mixers; a kept attention layer has nothing new."""
    return student, job.train(AlignLayers, student, stage, part, is_new)


class AlignLayers(StageTrainer):
    """Every converted mixer on its teacher layer's inputs, all layers at once."""

    def loss(self, model: nn.Module, ids: Tensor, seq_ids: Tensor | None) -> Tensor:
        student = self.accelerator.unwrap_model(model)
        seen: list[tuple[Tensor, Tensor]] = []
        hooks = [
            block.mixer.register_forward_hook(lambda _, args, output: seen.append((args[0], output[0])))
            for block in self.twin.model.layers
        ]
        try:
            with torch.no_grad():
                self.twin.model(input_ids=ids, seq_ids=seq_ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        ctx = student.model.make_context(*ids.shape, ids.device, seq_ids=seq_ids)
        losses = []
        for block, (given, wanted) in zip(student.model.layers, seen, strict=True):
            if any(p.requires_grad for p in block.mixer.parameters()):
                said, _ = block.mixer(given, None, ctx)
                wanted = wanted.float()
                losses.append((said.float() - wanted).pow(2).sum() / wanted.pow(2).sum())
        return torch.stack(losses).mean()
