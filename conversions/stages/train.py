"""End to end: kl * KL(teacher || student) + ce * cross-entropy + z_loss * logsumexp^2, each a mean over tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels.losses import linear_cross_entropy, linear_kl
from .training import StageTrainer

if TYPE_CHECKING:
    from ..job import Job, Part
    from ..recipes.stages import Train

__all__ = ["TrainEndToEnd", "next_tokens", "run"]


def run(job: Job, stage: Train, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """Trains the mixers, or everything."""
    return student, job.train(
        TrainEndToEnd, student, stage, part, lambda name: stage.trains == "all" or ".mixer." in name
    )


class TrainEndToEnd(StageTrainer):
    """KL to the teacher and cross-entropy on the final hidden states; logits never in full."""

    def loss(self, model: nn.Module, ids: Tensor, seq_ids: Tensor | None) -> Tensor:
        stage = self.stage
        hidden = self._final_hidden(model, ids, seq_ids)
        head = self.accelerator.unwrap_model(model).lm_head
        loss = hidden.new_zeros((), dtype=torch.float32)
        reference = None
        if stage.kl or (stage.ce and stage.labels == "teacher"):
            with torch.no_grad():
                reference = self.twin.model(input_ids=ids, seq_ids=seq_ids, use_cache=False).last_hidden_state
                reference = reference.flatten(0, 1)
        if stage.kl:
            loss = loss + stage.kl * linear_kl(
                hidden.flatten(0, 1), head.weight, reference, self.twin.lm_head.weight, student_bias=head.bias
            )
        if stage.ce:
            if stage.labels == "teacher":
                labels = most_likely(reference, self.twin.lm_head.weight).view_as(ids)
            else:
                labels = next_tokens(ids, seq_ids)
            loss = loss + stage.ce * linear_cross_entropy(
                hidden.flatten(0, 1), head.weight, labels.flatten(), bias=head.bias, z_loss=stage.z_loss
            )
        return loss

    def _final_hidden(self, model: nn.Module, ids: Tensor, seq_ids: Tensor | None) -> Tensor:
        """(B, T, D), through the wrapped model's own forward, as autocast and FSDP need it."""
        found: list[Tensor] = []
        norm = self.accelerator.unwrap_model(model).model.norm
        hook = norm.register_forward_hook(lambda _, args, output: found.append(output))
        try:
            model(input_ids=ids, seq_ids=seq_ids, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        return found[0]


def next_tokens(ids: Tensor, seq_ids: Tensor | None) -> Tensor:
    """Labels (B, T): the next token, -100 at the end of a document and of the row."""
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    if seq_ids is not None:
        labels[:, :-1].masked_fill_(seq_ids[:, 1:] != seq_ids[:, :-1], -100)
    return labels


@torch.no_grad()
def most_likely(hidden: Tensor, weight: Tensor) -> Tensor:
    """(N,) argmax of the logits of hidden (N, D), chunk by chunk."""
    return torch.cat([(rows @ weight.T).argmax(-1) for rows in hidden.split(256)])
