"""What all stages that train have in common: a `Trainer`, so that accelerate and FSDP need no other code.

A step's loss is the mean over its rows, which are all of one length. (Of the cross-entropy on text it is the mean of
each row's mean over its labels; a row of several documents has a few labels less than others.)
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ...kernels.files import replace_text
from ...zoo.core.heads import RecurrentForCausalLM
from ..context import StageContext, StageRun
from ..data import PackedTokens
from ..precision import mixed_precision
from ..processes import Processes, rows_per_step
from ..sharding import is_sharded, shard_frozen, units
from .base import TrainedStage
from .parameters import parts_of
from .schedules import rate_factor
from .window_dropout import kept_share, reduced_windows

__all__ = [
    "Report",
    "StageRules",
    "StageTrainer",
    "cut_metrics",
    "final_hidden",
    "newest_checkpoint",
    "next_tokens",
    "read_metrics",
    "run_trainer",
    "stage_arguments",
    "train",
    "train_stage",
]

CHECKPOINTS = 6  # in a stage
COMPLETE = "complete"  # a checkpoint without this file was cut off while it was written


class StageRules:
    """What a stage asks of a Trainer: its learning rates and schedule, and rows in the order in which they are."""

    stage: TrainedStage
    model: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups: dict[float, list[nn.Parameter]] = {}
            parts = parts_of(self.model)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault(self.stage.rate(parts[name]), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
                betas=(self.stage.beta1, self.stage.beta2),
                weight_decay=self.stage.weight_decay,
            )
        return self.optimizer

    def cycle(self, step: int, steps: int) -> tuple[int, int]:
        """First step, and the one after the last, of the learning rate's schedule that `step` is part of."""
        return 0, steps

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None

            def factor(step: int, peak: float) -> float:
                begin, end = self.cycle(min(step, num_training_steps - 1), num_training_steps)
                return rate_factor(self.stage, peak, step - begin, end - begin)

            factors = [functools.partial(factor, peak=group["lr"]) for group in optimizer.param_groups]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return self.lr_scheduler

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        # The rows were shuffled when they were packed; their order is part of the run.
        return torch.utils.data.SequentialSampler(self.train_dataset)


class StageTrainer(StageRules, Trainer):
    """A Trainer whose loss comes from a frozen teacher as well; subclasses say how."""

    # Our losses are means over the micro-batch; Trainer must divide them by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, stage: TrainedStage, teacher_model: RecurrentForCausalLM | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stage = stage
        if teacher_model is not None and self.is_fsdp_enabled:
            teacher_model = shard_frozen(teacher_model, self.accelerator.state.fsdp_plugin, self.args.device)
        self.teacher_model: Any = (
            teacher_model if teacher_model is None or self.is_fsdp_enabled else teacher_model.to(self.args.device)
        )
        self.model_accepts_loss_kwargs = False
        self.windows = contextlib.ExitStack()  # open from loss to loss: checkpointed layers run again in between

    def loss(self, model: nn.Module, ids: Tensor, seq_ids: Tensor | None, *others: Any) -> Tensor:
        """Mean over the tokens of ids (B, T); seq_ids (B, T), None where each row is one document; what else rows have.

        Called inside the forward pass of what wraps the student: `model` is the student itself, its weights are whole,
        and gradients of whatever part of it is used are summed over the processes.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def loss_as_forward(self) -> Iterator[None]:
        """Lets the student's forward pass, given `rows`, be the loss of these: wrappers know no other way in."""
        student: Any = self.model
        plain = student.forward

        def forward(*args: Any, rows: tuple[Any, ...] | None = None, **kwargs: Any) -> Any:
            return plain(*args, **kwargs) if rows is None else self.loss(student, *rows)

        student.forward = forward
        try:
            yield
        finally:
            self.windows.close()
            for name in ("forward", "_original_forward"):  # ours, and what accelerate has put around it
                vars(student).pop(name, None)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.windows.close()
        share = kept_share(self.stage.window_dropout, self.args.seed, self.state.global_step, inputs["input_ids"])
        self.windows.enter_context(reduced_windows(self.model, share))
        # Trainer's own autocast covers the wrapped model's forward only, not the head and the losses.
        with mixed_precision(inputs["input_ids"].device, self.args.bf16):
            seq_ids = inputs["seq_ids"]
            if bool((seq_ids == seq_ids[:, :1]).all()):
                seq_ids = None  # rows of one document each need no masks
            others = (value for name, value in inputs.items() if name not in ("input_ids", "seq_ids"))
            rows = (inputs["input_ids"], seq_ids, *others)
            direct = model is self.model and not self.is_fsdp_enabled
            loss = self.loss(model, *rows) if direct else model(rows=rows)
        return (loss, None) if return_outputs else loss


class Together(TrainerCallback):
    """Lets no process go on from a checkpoint, or mark it as whole, before all have written their part."""

    def on_save(self, args, state, control, **kwargs):
        Processes().wait()


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


def train(
    context: StageContext,
    trainer_class: type[StageTrainer],
    student: Any,
    stage: TrainedStage,
    stage_run: StageRun,
    trains: Callable[[str], bool],
    *,
    data: Any = None,
    teacher_model: Any = None,
    folder: Path | None = None,
    place: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Trains the student of a conversion in place; see `train_stage`.

    Args:
        data: rows; None: those of `stage_run`, of the training text. teacher_model: the teacher, if the loss asks one.
        folder: for checkpoints and metrics, if not the stage's. place: number of this training among all of the stage.
    """
    if data is None:
        data = context.training().rows(stage_run.rows.start, len(stage_run.rows))
    context.release_model()

    def progress(done: int, total: int, info: dict[str, Any]) -> None:
        context.progress(stage_run.name, place[0] * total + done, place[1] * total, info)

    return train_stage(
        trainer_class,
        student,
        teacher_model,
        stage,
        data,
        folder or context.folder / stage_run.name,
        trains=trains,
        batch_tokens=context.recipe.batch_tokens,
        bf16=context.bf16,
        seed=context.seed,
        progress=progress,
        checkpointing=context.checkpointing,
    )


def train_stage(
    trainer_class: type[StageTrainer],
    student: RecurrentForCausalLM,
    teacher_model: RecurrentForCausalLM | None,
    stage: TrainedStage,
    data: PackedTokens,
    folder: Path,
    *,
    trains: Callable[[str], bool],
    batch_tokens: int,
    bf16: bool,
    seed: int,
    progress: Callable[[int, int, dict[str, Any]], None],
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Trains the student in place; goes on from the newest whole checkpoint in `folder`.

    Args:
        teacher_model: the teacher, on any device; None: the loss asks none.
        trains: whether the parameter of this name is trained.
        checkpointing: keep of the blocks' activations their inputs alone, and make the others again for the gradient.
        data: rows, each a dictionary of input_ids, seq_ids and whatever else the loss takes, in its order.
    Returns:
        tokens, seconds, loss_first, loss_last of the stage; of several processes the main one has them.
    Raises:
        RnnzooError: the rows of a step cannot be divided among the processes.
    """
    processes = Processes()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trains(name))
    per_step = rows_per_step(batch_tokens, data.seq_len, len(data), processes.count)
    steps = max(1, len(data) // per_step)
    arguments = TrainingArguments(**stage_arguments(stage, folder, steps, per_step, bf16, seed, checkpointing))
    student._no_split_modules = units(student)
    arguments.ddp_find_unused_parameters = leaves_unused(student)
    trainer = trainer_class(model=student, args=arguments, train_dataset=data, stage=stage, teacher_model=teacher_model)
    with trainer.loss_as_forward():
        report = run_trainer(trainer, folder, per_step * data.seq_len, progress)
    if teacher_model is not None and not is_sharded(teacher_model):
        teacher_model.cpu()
    return report


def stage_arguments(
    stage: TrainedStage, folder: Path, steps: int, per_step: int, bf16: bool, seed: int, checkpointing: bool = False
) -> dict[str, Any]:
    """Settings of a Trainer that takes `steps` optimiser steps of `per_step` rows, of all processes together."""
    return dict(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=per_step // Processes().count,
        max_steps=steps,
        learning_rate=stage.lr,
        max_grad_norm=stage.max_grad_norm,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=max(1, math.ceil(steps / CHECKPOINTS)),
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
    )


def run_trainer(
    trainer: Trainer, folder: Path, tokens_per_step: int, progress: Callable[[int, int, dict[str, Any]], None]
) -> dict[str, Any]:
    """Trains from the newest whole checkpoint in `folder` on; returns the report, in the main process."""
    processes, student = Processes(), trainer.model
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = processes.first(lambda: newest_checkpoint(folder))
    trainer.add_callback(Together())
    if processes.main:
        cut_metrics(folder, checkpoint)
        trainer.add_callback(Report(folder, tokens_per_step, progress))
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    student.config.use_cache = False
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    student.config.use_cache = True
    student.eval()
    if not is_sharded(student):
        student.cpu()
    if not processes.main:
        return {}
    lines = read_metrics(folder)
    return {
        "tokens": trainer.state.max_steps * tokens_per_step,
        "seconds": round(lines[-1]["seconds"], 1),
        "loss_first": lines[0]["loss"],
        "loss_last": sum(line["loss"] for line in lines[-4:]) / len(lines[-4:]),
    }


def leaves_unused(student: nn.Module) -> bool:
    """Whether a pass over text may leave parameters unused: those of columns that plain text lacks, and empty ones."""
    takes_columns = any(getattr(module, "columns", ()) for module in student.modules())
    return takes_columns or any(not parameter.numel() for parameter in student.parameters())


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
