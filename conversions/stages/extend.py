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

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels.losses import linear_cross_entropy
from ...zoo.core.cache import CACHE_NAME, RecurrentCache
from .cached_teacher import repeated
from .lora import trainable
from .other_teacher import twin_of
from .predictions import Whole
from .train import final_hidden, next_tokens
from .training import StageTrainer

if TYPE_CHECKING:
    from ..job import Job, Part
    from ..recipes.stages import Extend

__all__ = ["ExtendContext", "run"]


def run(job: Job, stage: Extend, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """Trains on rows of `stage.length` tokens, which are packed for this stage."""
    packed = job.packed(stage.name, int(job.recipe.tokens * stage.share), stage.length)
    rows = packed.rows(part.rows.start, -(-len(part.rows) // stage.epochs))
    rows = repeated(rows, len(part.rows), job.seed)
    twin = twin_of(job, stage) if stage.asks_teacher() else None
    with trainable(student, stage, job.seed) as trains:
        report = job.train(ExtendContext, student, stage, part, trains, data=rows, twin=twin)
    return student, report


class ExtendContext(StageTrainer):
    """A backward pass for every group of chunks; their gradients add up to those of the row, cut between groups."""

    stage: Extend
    caches: tuple[RecurrentCache, RecurrentCache | None]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        student: Any = self.model
        self.caches = (RecurrentCache(student.config), RecurrentCache(self.twin.config) if self.twin else None)
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
        if self.twin is None:
            return torch.ones_like(ids, dtype=torch.bool)
        column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if seq_ids is not None:
            begins = torch.ones_like(ids, dtype=torch.bool)
            begins[:, 1:] = seq_ids[:, 1:] != seq_ids[:, :-1]
            column = column - torch.where(begins, column, 0).cummax(1).values
        return column < self.twin.config.max_position_embeddings

    @torch.no_grad()
    def _teacher(self, ids: Tensor, seq_ids: Tensor | None, known: Tensor) -> Whole | None:
        """Its predictions for a chunk; None where it knows no position of it.

        A chunk that it has not read is missing from its cache, but what comes after in that document it does not know
        either, and a new document starts afresh.
        """
        if self.twin is None or not bool(known.any()):
            return None
        hidden = final_hidden(self.twin, ids, seq_ids, use_cache=True, **{CACHE_NAME: self.caches[1]})
        return Whole(hidden.flatten(0, 1), self.twin.lm_head.weight[: self.model.config.vocab_size])

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
