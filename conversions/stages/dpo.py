"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), by TRL:

    -log sigmoid(beta * (log p(chosen) / r(chosen) - log p(rejected) / r(rejected)))

p is the student, r the student as the stage found it. The log-probabilities of r are computed once, before training,
and kept beside the data; no second model is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...kernels.errors import RnnzooError
from ..context import StageContext, StageRun
from ..data.chats import Kind, chat_tokens
from ..processes import rows_per_step
from ..recipes import Recipe
from .own_data import OwnData, row_order

__all__ = ["Dpo"]

ANSWERS = ("chosen", "rejected")


@dataclass
class Dpo(OwnData):
    """Direct preference optimisation (Rafailov et al. 2023, TRL) against the student as the stage found it.

    Attributes:
        beta: how much the student is held to where it was. batch: pairs in an optimiser step.
    """

    reads: ClassVar[Kind] = "preference"
    kind: str = "dpo"
    lr: float = 5e-7
    new_lr: float = 5e-7
    beta: float = 0.01
    batch: int = 8

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if self.beta <= 0 or self.batch < 1:
            raise RnnzooError(f"beta is {self.beta:g} and batch {self.batch}; both must be positive.")

    def learns_from(self) -> list[str]:
        whose = "preferences of your own" if self.data is None else f"the preferences {self.data}"
        return [f"DPO on {whose}, beta {self.beta:g}"]

    def row(self, example: dict[str, Any], context: StageContext) -> tuple[dict[str, Any], int, dict[str, int]] | None:
        if not all(example[name] for name in ANSWERS) or example["chosen"] == example["rejected"]:
            return None  # no preference in it: collections of them have a few such
        sizes = [len(chat_tokens(example["prompt"] + example[name], context.tokenizer)[0]) for name in ANSWERS]
        # Cut short, two answers may be the same.
        return None if max(sizes) > context.recipe.seq_len else (example, sum(sizes), {})

    def run(self, context: StageContext, student: Any, stage_run: StageRun) -> tuple[Any, dict[str, Any]]:
        """Trains on the stage's pairs; reports the tokens of both answers, with their prompts."""
        from trl import DPOConfig, DPOTrainer

        dataset, record = self.load(context)
        per_step = rows_per_step(self.batch, 1, len(dataset), context.processes.count)
        order = row_order(len(dataset), self.epochs, per_step, context.seed)
        report = self.learn(
            context,
            student,
            stage_run,
            (DPOTrainer, DPOConfig),
            dataset.select(order),
            len(order) // per_step,
            record["tokens"] * len(order) // len(dataset),
            beta=self.beta,
            precompute_ref_log_probs=True,
        )
        return student, report | {"examples": record["examples"], "left_out": record["left_out"]}
