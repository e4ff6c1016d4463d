"""Supervised fine-tuning on chats, by TRL: cross-entropy on what the assistant says, several whole chats in a row.

A packed row says where each chat begins, and the state is empty there: no chat reads what another left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..processes import rows_per_step
from .examples import load_examples, row_order
from .lora import trainable
from .training import StageRules, leaves_unused, run_trainer, stage_arguments

if TYPE_CHECKING:
    from ..job import Job, Part
    from ..recipes.stages import Sft

__all__ = ["own_trainer", "quiet", "run"]


def run(job: Job, stage: Sft, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """Trains on the stage's chats; reports the tokens of the rows, whole."""
    from trl import SFTConfig, SFTTrainer

    dataset, record = load_examples(job, stage)
    per_step = rows_per_step(job.recipe.batch_tokens, job.recipe.seq_len, len(dataset), job.processes.count)
    order = row_order(len(dataset), stage.epochs, per_step, job.seed)
    tokens = sum(len(dataset[n]["input_ids"]) for n in order)
    steps = len(order) // per_step
    bf16 = job.dtype == torch.bfloat16
    with trainable(student, stage, job.seed) as trains, quiet():
        trainer = own_trainer(SFTTrainer)(
            model=student,
            args=SFTConfig(
                **stage_arguments(
                    stage, job.run.folder / part.name, steps, per_step, bf16, job.seed, job.checkpointing
                ),
                padding_free=True,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                gradient_checkpointing=False,
            ),
            train_dataset=dataset.select(order),
            processing_class=job.tokenizer,
        )
        report = trainer.run(stage, student, trains, job, part, tokens // steps)
    about = {name: record[name] for name in ("examples", "left_out", "loss_on_all_of") if name in record}
    return student, report | {"tokens": tokens} | about


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what TRL says about settings that are meant, and without its progress bars, which would break ours."""
    logger, before = logging.getLogger("trl"), os.environ.get("TQDM_DISABLE")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        logger.setLevel(logging.ERROR)
        os.environ["TQDM_DISABLE"] = "1"
        try:
            yield
        finally:
            logger.setLevel(level)
            if before is None:
                del os.environ["TQDM_DISABLE"]
            else:
                os.environ["TQDM_DISABLE"] = before


def own_trainer(base: type) -> Any:
    """A trainer of TRL's, with our learning rates and order of rows, that leaves the student as it found it."""

    class Own(StageRules, base):
        def run(self, stage: Any, student: Any, trains: Any, job: Job, part: Part, per_step: int) -> dict[str, Any]:
            """Trains in place; goes on from the newest whole checkpoint.

            Args:
                trains: which parameters. per_step: tokens of a step.
            """
            self.stage = stage
            self.args.ddp_find_unused_parameters = leaves_unused(student)
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(trains(name))
            told = lambda done, total, info: job.progress(part.name, done, total, info)  # noqa: E731
            try:
                return run_trainer(self, job.run.folder / part.name, per_step, told)
            finally:
                for name in ("forward", "_original_forward"):  # what TRL and accelerate have put around it
                    vars(student).pop(name, None)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """The conversion writes one."""

    return Own
