"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), by TRL:

    -log sigmoid(beta * (log p(chosen) / r(chosen) - log p(rejected) / r(rejected)))

p is the student, r the student as the stage found it. The log-probabilities of r are computed once, before training,
and kept beside the data; no second model is in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..processes import rows_per_step
from .examples import load_examples, row_order
from .lora import trainable
from .sft import own_trainer, quiet
from .training import stage_arguments

if TYPE_CHECKING:
    from ..job import Job, Part
    from ..recipes.stages import Dpo

__all__ = ["run"]


def run(job: Job, stage: Dpo, student: Any, part: Part) -> tuple[Any, dict[str, Any]]:
    """Trains on the stage's pairs; reports the tokens of both answers, with their prompts."""
    from trl import DPOConfig, DPOTrainer

    dataset, record = load_examples(job, stage)
    per_step = rows_per_step(stage.batch, 1, len(dataset), job.processes.count)
    order = row_order(len(dataset), stage.epochs, per_step, job.seed)
    tokens = record["tokens"] * len(order) // len(dataset)
    steps = len(order) // per_step
    bf16 = job.dtype == torch.bfloat16
    with trainable(student, stage, job.seed) as trains, quiet():
        trainer = own_trainer(DPOTrainer)(
            model=student,
            args=DPOConfig(
                **stage_arguments(
                    stage, job.run.folder / part.name, steps, per_step, bf16, job.seed, job.checkpointing
                ),
                beta=stage.beta,
                precompute_ref_log_probs=True,
                max_length=None,
                gradient_checkpointing=False,
            ),
            train_dataset=dataset.select(order),
            processing_class=job.tokenizer,
        )
        report = trainer.run(stage, student, trains, job, part, tokens // steps)
    return student, report | {"tokens": tokens, "examples": record["examples"], "left_out": record["left_out"]}
