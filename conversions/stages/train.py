"""End to end: kl * KL(teacher || student) + reverse_kl * KL(student || teacher) + ce * (cross-entropy + z_loss *
logsumexp^2), each a mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.errors import RnnzooError
from ...zoo.core.configuration import RecurrentConfig
from ..context import StageContext, StageRun
from ..data import check_sequence_length
from ..recipes import Recipe
from ..teachers import TeacherRef
from .cached_teacher import cached_rows, repeated
from .distilled import Distilled, Likeliest, Whole, distillation_loss, teacher_model_of
from .end_to_end import trainable
from .training import StageTrainer, final_hidden, next_tokens, train

__all__ = ["Train", "TrainEndToEnd"]


@dataclass
class Train(Distilled):
    """End to end on the training text.

    Attributes:
        cache_top_k: run the teacher once, before training, and keep so many of its largest log-probabilities a token;
            the divergences are then between these and the mass of all others. 0: run it at every step.
    """

    kind: str = "train"
    cache_top_k: int = 0

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if self.cache_top_k < 0 or (self.cache_top_k and not self.asks_teacher()):
            raise RnnzooError(
                f"cache_top_k is {self.cache_top_k}; it keeps predictions of the teacher, 0 or more a token, for kl, "
                "reverse_kl or labels: teacher."
            )

    def other_teacher(self, recipe: Recipe) -> TeacherRef | None:
        found = super().other_teacher(recipe)
        if found is not None:
            check_sequence_length(recipe.seq_len, found.config, f"the teacher {found.name}")
        return found

    def check_student(self, recipe: Recipe, teacher: TeacherRef, config: RecurrentConfig, dtype: torch.dtype) -> None:
        super().check_student(recipe, teacher, config, dtype)
        if self.cache_top_k >= config.vocab_size:
            raise RnnzooError(
                f"cache_top_k is {self.cache_top_k}, but the vocabulary has {config.vocab_size} tokens; keep fewer, "
                "such as 64, or leave it out."
            )

    def run(self, context: StageContext, student: Any, stage_run: StageRun) -> tuple[Any, dict[str, Any]]:
        """Trains the mixers, adapters on them, or everything; on rows with the teacher's predictions, if kept."""
        rows = context.training().rows(stage_run.rows.start, -(-len(stage_run.rows) // self.epochs))
        about, teacher_model = {}, None
        if self.cache_top_k:
            rows, about = cached_rows(context, self, self.cache_top_k, stage_run, rows)
        elif self.asks_teacher():
            teacher_model = teacher_model_of(context, self)
        rows = repeated(rows, len(stage_run.rows), context.seed)
        with trainable(student, self, context.seed) as trains:
            report = train(
                context, TrainEndToEnd, student, self, stage_run, trains, data=rows, teacher_model=teacher_model
            )
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
                hidden_states = self.teacher_model.model(
                    input_ids=ids, seq_ids=seq_ids, use_cache=False
                ).last_hidden_state
            teacher = Whole(hidden_states.flatten(0, 1), self.teacher_model.lm_head.weight[: model.config.vocab_size])
        return distillation_loss(self.stage, hidden, model.lm_head, teacher, next_tokens(ids, seq_ids).flatten())
