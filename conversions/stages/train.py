"""End to end: kl * KL(teacher || student) + reverse_kl * KL(student || teacher) + ce * (cross-entropy + z_loss *
logsumexp^2), each a mean over tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cached_teacher import cached_rows, repeated
from .lora import trainable
from .other_teacher import twin_of
from .predictions import Likeliest, Whole, distillation_loss
from .training import StageTrainer

if TYPE_CHECKING:
    from ..job import Job, Part
    from ..recipes.stages import Distilled, Train

__all__ = ["TrainEndToEnd", "final_hidden", "next_tokens", "run"]


def run(job: Job, stage: Train, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """Trains the mixers, adapters on them, or everything; on rows with the teacher's predictions, if these are kept."""
    rows = job.packed("training", job.recipe.tokens).rows(part.rows.start, -(-len(part.rows) // stage.epochs))
    about, twin = {}, None
    if stage.cache_top_k:
        rows, about = cached_rows(job, stage, part, rows)
    elif stage.asks_teacher():
        twin = twin_of(job, stage)
    rows = repeated(rows, len(part.rows), job.seed)
    with trainable(student, stage, job.seed) as trains:
        report = job.train(TrainEndToEnd, student, stage, part, trains, data=rows, twin=twin)
    return student, report | about


class TrainEndToEnd(StageTrainer):
    """Divergence from the teacher and cross-entropy on the final hidden states; logits never in full."""

    stage: Distilled

    def loss(self, model: nn.Module, ids: Tensor, seq_ids: Tensor | None, *kept: Tensor) -> Tensor:
        """Mean over the tokens; `kept` are the fields of `Likeliest`, a row each, (B, T, ...)."""
        hidden = final_hidden(model, ids, seq_ids).flatten(0, 1)
        teacher = None
        if kept:
            teacher = Likeliest(*(x.flatten(0, 1) for x in kept))
        elif self.stage.asks_teacher():
            with torch.no_grad():
                told = self.twin.model(input_ids=ids, seq_ids=seq_ids, use_cache=False).last_hidden_state
            teacher = Whole(told.flatten(0, 1), self.twin.lm_head.weight[: model.config.vocab_size])
        return distillation_loss(self.stage, hidden, model.lm_head, teacher, next_tokens(ids, seq_ids).flatten())


def final_hidden(model: Any, ids: Tensor, seq_ids: Tensor | None, **options: Any) -> Tensor:
    """(B, T, D), of the student itself; options of its forward pass."""
    return model.model(input_ids=ids, seq_ids=seq_ids, **({"use_cache": False} | options)).last_hidden_state


def next_tokens(ids: Tensor, seq_ids: Tensor | None) -> Tensor:
    """Labels (B, T): the next token, -100 at the end of a document and of the row."""
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    if seq_ids is not None:
        labels[:, :-1].masked_fill_(seq_ids[:, 1:] != seq_ids[:, :-1], -100)
    return labels
