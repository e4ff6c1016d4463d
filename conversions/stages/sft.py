"""Supervised fine-tuning on chats, by TRL: cross-entropy on what the assistant says, several whole chats in a row.

A packed row says where each chat begins, and the state is empty there: no chat reads what another left behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..context import StageContext, StageRun
from ..data.chats import Kind, chat_tokens
from ..processes import rows_per_step
from .own_data import OwnData, row_order

__all__ = ["Sft"]


@dataclass
class Sft(OwnData):
    """Supervised fine-tuning on chats (TRL), as the tokenizer's chat template writes them.

    Attributes:
        loss_on: "assistant" for what the assistant says, wherever the template lets that be told apart, or "all".
    """

    reads: ClassVar[Kind] = "chat"
    kind: str = "sft"
    lr: float = 2e-5
    new_lr: float = 2e-5
    loss_on: str = "assistant"

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"loss_on": ("assistant", "all")}

    def learns_from(self) -> list[str]:
        return ["chats of your own" if self.data is None else f"the chats {self.data}"]

    def row(self, example: dict[str, Any], context: StageContext) -> tuple[dict[str, Any], int, dict[str, int]] | None:
        longest = context.recipe.seq_len
        ids, said = chat_tokens(example["messages"], context.tokenizer)
        whole = {"loss_on_all_of": int(said is None)}  # the template does not tell who speaks: the loss is on all
        if said is None or self.loss_on == "all":
            said = [True] * len(ids)
        if not any(said[:longest]):
            return None
        labels = [token if mine else -100 for token, mine in zip(ids, said, strict=True)]
        return {"input_ids": ids[:longest], "labels": labels[:longest]}, min(len(ids), longest), whole

    def packed(self, dataset: Any, context: StageContext) -> Any:
        """Rows of whole chats, `seq_lengths` tokens each; best fit puts the long ones first, so they are shuffled."""
        from trl import pack_dataset

        return pack_dataset(dataset, context.recipe.seq_len, "bfd").shuffle(seed=context.seed).flatten_indices()

    def run(self, context: StageContext, student: Any, stage_run: StageRun) -> tuple[Any, dict[str, Any]]:
        """Trains on the stage's chats; reports the tokens of the rows, whole."""
        from trl import SFTConfig, SFTTrainer

        recipe = context.recipe
        dataset, record = self.load(context)
        per_step = rows_per_step(recipe.batch_tokens, recipe.seq_len, len(dataset), context.processes.count)
        order = row_order(len(dataset), self.epochs, per_step, context.seed)
        tokens = sum(len(dataset[n]["input_ids"]) for n in order)
        report = self.learn(
            context,
            student,
            stage_run,
            (SFTTrainer, SFTConfig),
            dataset.select(order),
            len(order) // per_step,
            tokens,
            padding_free=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        about = {name: record[name] for name in ("examples", "left_out", "loss_on_all_of") if name in record}
        return student, report | about
