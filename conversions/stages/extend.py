"""Longer context: a row is read chunk by chunk, and the state goes on from chunk to chunk.

    chunk      0              1              2              3
    state    0 ----> S_1 -|-------> S_2 -|-------> S_3 -|------->        |: cut from the gradient (grad_chunks: 1)

A state that was never long in training overflows when it is (Stuffed Mamba, arXiv 2410.07145). Memory is that of the
group of chunks that the gradient goes through, whatever the length of the row.

The teacher reads along, with its own cache, as far as it was trained: at positions beyond `max_position_embeddings` of
a document it is not asked, and the loss is cross-entropy on the text. In all, of N tokens with M labels,

    (kl * sum KL(teacher || student) + reverse_kl * sum KL(student || teacher)) / N
        + (ce * sum_within CE + beyond * sum_beyond CE) / M

which is the loss of a `train` stage where the row is one chunk that the teacher knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels.errors import RnnzooError
from ...kernels.losses import linear_cross_entropy
from ...zoo.core.cache import CACHE_NAME, RecurrentCache
from ..context import StageContext, StageRun
from ..data import PackedTokens
from ..recipes import Recipe
from .cached_teacher import repeated
from .distilled import Distilled, Whole, teacher_model_of
from .end_to_end import trainable
from .training import StageTrainer, final_hidden, next_tokens, train

__all__ = ["Extend", "ExtendContext"]


@dataclass
class Extend(Distilled):
    """Longer rows, read chunk by chunk with the state passed on, after Stuffed Mamba (2024, arXiv 2410.07145).

    Attributes:
        length: tokens of a row. chunk: of a forward pass.
        grad_chunks: chunks that the gradient goes back through, the state being cut from it between such groups.
        beyond: weight of cross-entropy on the text at positions that the teacher was not trained on.
    """

    kind: str = "extend"
    own_rows: ClassVar[bool] = True
    length: int = 16384
    chunk: int = 2048
    grad_chunks: int = 1
    beyond: float = 1.0

    def row_length(self, recipe: Recipe) -> int:
        return self.length

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if not 2 <= self.chunk <= self.length:
            raise RnnzooError(f"chunk is {self.chunk}; it must lie between 2 and length, which is {self.length}.")
        if self.grad_chunks < 1 or self.beyond < 0:
            raise RnnzooError("grad_chunks must be 1 or more, and beyond not negative.")

    def learns_from(self) -> list[str]:
        rows = f"rows of {self.length:,} tokens, read {self.chunk:,} at a time with the state passed on"
        return [rows, *super().learns_from()]

    def packed(self, context: StageContext) -> PackedTokens:
        """Its own rows."""
        return context.packed(self.name, int(context.recipe.tokens * self.share), self.length)

    def prepare(self, context: StageContext) -> None:
        if context.recipe.tokens and self.share:
            self.packed(context)

    def run(self, context: StageContext, student: Any, stage_run: StageRun) -> tuple[Any, dict[str, Any]]:
        """Trains on rows of `length` tokens, which are packed for this stage."""
        rows = self.packed(context).rows(stage_run.rows.start, -(-len(stage_run.rows) // self.epochs))
        rows = repeated(rows, len(stage_run.rows), context.seed)
        teacher_model = teacher_model_of(context, self) if self.asks_teacher() else None
        with trainable(student, self, context.seed) as trains:
            report = train(
                context, ExtendContext, student, self, stage_run, trains, data=rows, teacher_model=teacher_model
            )
        return student, report


class ExtendContext(StageTrainer):
    """A backward pass for every group of chunks; their gradients add up to those of the row, cut between groups."""

    stage: Extend
    caches: tuple[RecurrentCache, RecurrentCache | None]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        student: Any = self.model
        self.caches = (
            RecurrentCache(student.config),
            RecurrentCache(self.teacher_model.config) if self.teacher_model else None,
        )
        total = torch.zeros((), device=self.args.device)
        group = self.stage.chunk * self.stage.grad_chunks
        for begin in range(0, inputs["input_ids"].shape[1], group):
            total += super().training_step(model, inputs | {"begin": begin}, num_items_in_batch)
            self.caches[0].detach()
        return total

    def loss(self, model: nn.Module, ids: Tensor, seq_ids: Tensor | None, begin: int = 0) -> Tensor:
        """The part of the row's loss that the chunks of the group from column `begin` on have."""
        labels, known = next_tokens(ids, seq_ids), self._known(ids, seq_ids)
        labelled = labels != -100
        counted = (known | labelled if self.stage.labels == "teacher" else labelled).sum()
        loss = torch.zeros((), device=ids.device)
        end = min(begin + self.stage.chunk * self.stage.grad_chunks, ids.shape[1])
        for first in range(begin, end, self.stage.chunk):
            columns = slice(first, min(first + self.stage.chunk, end))
            documents = None if seq_ids is None else seq_ids[:, columns]
            hidden = final_hidden(model, ids[:, columns], documents, use_cache=True, **{CACHE_NAME: self.caches[0]})
            teacher = self._teacher(ids[:, columns], documents, known[:, columns])
            divergence, entropy = self._sums(
                hidden.flatten(0, 1), model, teacher, labels[:, columns].flatten(), known[:, columns].flatten()
            )
            loss = loss + divergence / ids.numel() + entropy / counted.clamp(min=1)
        return loss

    def _known(self, ids: Tensor, seq_ids: Tensor | None) -> Tensor:
        """(B, T) bool: positions in their documents that the teacher was trained on; all, where none is asked."""
        if self.teacher_model is None:
            return torch.ones_like(ids, dtype=torch.bool)
        column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if seq_ids is not None:
            begins = torch.ones_like(ids, dtype=torch.bool)
            begins[:, 1:] = seq_ids[:, 1:] != seq_ids[:, :-1]
            column = column - torch.where(begins, column, 0).cummax(1).values
        return column < self.teacher_model.config.max_position_embeddings

    @torch.no_grad()
    def _teacher(self, ids: Tensor, seq_ids: Tensor | None, known: Tensor) -> Whole | None:
        """Its predictions for a chunk; None where it knows no position of it.

        A chunk that it has not read is missing from its cache, but what comes after in that document it does not know
        either, and a new document starts afresh.
        """
        if self.teacher_model is None or not bool(known.any()):
            return None
        hidden = final_hidden(self.teacher_model, ids, seq_ids, use_cache=True, **{CACHE_NAME: self.caches[1]})
        return Whole(hidden.flatten(0, 1), self.teacher_model.lm_head.weight[: self.model.config.vocab_size])

    def _sums(
        self, hidden: Tensor, model: Any, teacher: Whole | None, labels: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums over a chunk's tokens (N,): of the divergences, and of the cross-entropies."""
        stage, head = self.stage, model.lm_head
        divergence = entropy = hidden[:0].float().sum()  # 0, with a gradient, where nothing counts
        for weight, reverse in ((stage.kl, False), (stage.reverse_kl, True)):
            if weight and teacher is not None:
                divergence = divergence + weight * teacher.kl(
                    hidden, head, reverse=reverse, weights=known, reduction="sum"
                )
        within = teacher.labels() if teacher is not None and stage.labels == "teacher" else labels
        for weight, targets in (
            (stage.ce, within.masked_fill(~known, -100)),
            (stage.beyond, labels.masked_fill(known, -100)),
        ):
            if weight and bool((targets != -100).any()):
                entropy = entropy + weight * linear_cross_entropy(
                    hidden, head.weight, targets, bias=head.bias, z_loss=stage.z_loss, reduction="sum"
                )
        return divergence, entropy
