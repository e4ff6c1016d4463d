"""What all stages that train have in common: a `Trainer`, so that accelerate and FSDP need no other code.

A step's loss is the mean over its rows, which are all of one length. (Of the cross-entropy on text it is the mean of
each row's mean over its labels; a row of several documents has a few labels less than others.)
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..files import replace_text

if TYPE_CHECKING:
    from ...zoo.core.modeling import RecurrentForCausalLM
    from ..data import PackedTokens
    from ..recipes.stages import TrainedStage

__all__ = ["Report", "StageTrainer", "cut_metrics", "is_new", "newest_checkpoint", "read_metrics", "train_stage"]

CHECKPOINTS = 6  # in a stage
COMPLETE = "complete"  # a checkpoint without this file was cut off while it was written


class StageTrainer(Trainer):
    """A Trainer whose loss comes from a frozen teacher as well; subclasses say how."""

    # Our losses are means over the micro-batch; Trainer must divide them by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, stage: TrainedStage, twin: RecurrentForCausalLM, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stage = stage
        self.twin = twin.to(self.args.device)
        self.model_accepts_loss_kwargs = False

    def loss(self, model: nn.Module, ids: Tensor, seq_ids: Tensor | None) -> Tensor:
        """Mean over the tokens of ids (B, T); seq_ids (B, T), None where each row is one document."""
        raise NotImplementedError

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Trainer's own autocast covers the wrapped model's forward only, not the head and the losses.
        with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=self.args.bf16):
            seq_ids = inputs["seq_ids"]
            if bool((seq_ids == seq_ids[:, :1]).all()):
                seq_ids = None  # rows of one document each need no masks
            loss = self.loss(model, inputs["input_ids"], seq_ids)
        return (loss, None) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups: dict[float, list[nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    rate = self.stage.new_lr if is_new(name) else self.stage.lr
                    groups.setdefault(rate, []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
                betas=(0.9, self.stage.beta2),
                weight_decay=0.0,
            )
        return self.optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        # The rows were shuffled when they were packed; their order is part of the run.
        return torch.utils.data.SequentialSampler(self.train_dataset)


def is_new(name: str) -> bool:
    """Is the parameter the student's own, not one that came from the teacher?"""
    old = (".proj.", "in_proj", "out_proj", "b_norm", "c_norm")
    return ".mixer." in name and not any(part in name for part in old)


class Report(TrainerCallback):
    """Metrics as JSON lines, progress, and the mark that makes a checkpoint count."""

    def __init__(self, folder: Path, tokens_per_step: int, progress: Callable[..., None]):
        self.folder, self.tokens_per_step, self.progress = folder, tokens_per_step, progress
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        lines = read_metrics(self.folder)
        self.started = time.monotonic() - (lines[-1]["seconds"] if lines else 0.0)
        self.progress(state.global_step * self.tokens_per_step, state.max_steps * self.tokens_per_step, {})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        tokens = state.global_step * self.tokens_per_step
        seconds = time.monotonic() - self.started
        line = {"step": state.global_step, "tokens": tokens, "seconds": round(seconds, 3), "loss": logs["loss"]}
        line |= {"learning_rate": logs.get("learning_rate"), "gradient_norm": logs.get("grad_norm")}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.progress(tokens, state.max_steps * self.tokens_per_step, {"loss": logs["loss"]})

    def on_save(self, args, state, control, **kwargs):
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def train_stage(
    trainer_class: type[StageTrainer],
    student: RecurrentForCausalLM,
    twin: RecurrentForCausalLM,
    stage: TrainedStage,
    data: PackedTokens,
    folder: Path,
    *,
    trains: Callable[[str], bool],
    batch_tokens: int,
    bf16: bool,
    seed: int,
    progress: Callable[[int, int, dict[str, Any]], None],
) -> dict[str, Any]:
    """Trains the student in place; goes on from the newest whole checkpoint in `folder`.

    Args:
        trains: whether the parameter of this name is trained.
    Returns:
        tokens, seconds, loss_first, loss_last of the stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trains(name))
    per_step = max(1, min(batch_tokens // data.seq_len, len(data)))
    steps = max(1, len(data) // per_step)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=per_step,
        max_steps=steps,
        learning_rate=stage.lr,
        lr_scheduler_type="cosine" if stage.schedule == "cosine" else "constant_with_warmup",
        warmup_steps=math.ceil(stage.warmup * steps) if steps > 1 else 0,  # the first step of a warmup has rate 0
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=max(1, math.ceil(steps / CHECKPOINTS)),
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
    )
    report = Report(folder, per_step * data.seq_len, progress)
    checkpoint = newest_checkpoint(folder)
    cut_metrics(folder, checkpoint)
    student.config.use_cache = False
    trainer = trainer_class(
        model=student, args=arguments, train_dataset=data, callbacks=[report], stage=stage, twin=twin
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    student.config.use_cache = True
    student.eval().cpu()
    twin.cpu()
    lines = read_metrics(folder)
    return {
        "tokens": steps * per_step * data.seq_len,
        "seconds": round(lines[-1]["seconds"], 1),
        "loss_first": lines[0]["loss"],
        "loss_last": sum(line["loss"] for line in lines[-4:]) / len(lines[-4:]),
    }


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; those that were cut off are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def cut_metrics(folder: Path, checkpoint: Path | None) -> None:
    """Forgets the metrics of steps that will be done again."""
    step = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
    kept = [json.dumps(line) + "\n" for line in read_metrics(folder) if line["step"] <= step]
    replace_text(folder / "metrics.jsonl", "".join(kept))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole: the last one of a killed run may not be."""
    file = folder / "metrics.jsonl"
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
