"""A training from scratch under way: its text in rows, transformers' Trainer over them, the finished model."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from ..cards import render_card
from ..kernels.errors import RnnzooError
from ..zoo.core.sizes import causal_lm_class
from . import evaluation
from .data import Corpus, PackedTokens, TextHashes, corpus_from_texts, pack
from .precision import compute_dtype
from .processes import Processes
from .results import write_training_results
from .run_folder import FINISHED, Run, write_json
from .stages.training import CHECKPOINTS, read_metrics, run_trainer
from .train_config import TrainSettings, architecture_of

__all__ = ["STAGE", "Progress", "TrainingFromScratch", "rows_to_batch"]

HELD_OUT_TOKENS = 100_000  # of the loss on held-out text, at most
HELD_OUT_CHARACTERS = 400_000
STAGE = "train"
Progress = Callable[[str, int, int, dict[str, Any]], None]


class RowsTrainer(Trainer):
    """Packed rows to batches, weight decay for matrices alone."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Decay rates, time steps and the like are parameters of their own name, whatever their shape.
        return [name for name, p in model.named_parameters() if p.dim() >= 2 and name.endswith("weight")]


def rows_to_batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of `PackedTokens` -> input_ids, labels and, where a row holds several documents, seq_ids; all (B, T).

    The model shifts the labels; the first token of a document is nobody's next token.
    """
    ids, documents = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "seq_ids"))
    labels = ids.clone()
    labels[:, 1:].masked_fill_(documents[:, 1:] != documents[:, :-1], -100)
    batch = {"input_ids": ids, "labels": labels}
    return batch if bool((documents == documents[:, :1]).all()) else batch | {"seq_ids": documents}


class TrainingFromScratch:
    """`prepare`, then `train` unless the run is finished, then `results`; see `conversions.train.train`."""

    def __init__(
        self,
        run: Run,
        config: Any,
        tokenizer: Any,
        corpus: Corpus,
        held_out: Corpus | None,
        settings: TrainSettings,
        processes: Processes,
        progress: Progress,
    ):
        self.run, self.config, self.tokenizer, self.settings = run, config, tokenizer, settings
        self.processes, self.main, self.progress = processes, processes.main, progress
        self.corpus = dataclasses.replace(corpus, evaluation=100 * settings.eval_fraction, calibration=0)
        self.held_out = held_out
        self.dtype = getattr(torch, settings.dtype)

    # Data ----------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes or reads the held-out text and the rows, so that unusable text stops a run before it began."""
        path = self.run.folder / "evaluation_texts.json"
        if not path.exists():
            source, split = (self.held_out, None) if self.held_out else (self.corpus, "evaluation")
            write_json(path, source.beginning(split, HELD_OUT_CHARACTERS))
        self.texts: list[str] = json.loads(path.read_text(encoding="utf-8"))
        folder = self.run.folder / "data"
        folder.mkdir(exist_ok=True)
        context = self.settings.context
        texts = corpus_from_texts(self.texts, (self.held_out or self.corpus).source)
        all_rows = self._packed(folder, "evaluation", texts, None, None, min(context, self._half_of_the_held_out()))
        self.eval_rows = all_rows.rows(0, max(1, min(len(all_rows), HELD_OUT_TOKENS // all_rows.seq_len)))
        split = None if self.held_out else "training"
        self.rows = self._packed(folder, "training", self.corpus, split, self._wanted_tokens(), context)

    def _half_of_the_held_out(self) -> int:
        """In tokens. A context longer than all held-out text is measured on rows of that length."""
        return max(2, sum(map(len, self.tokenizer(self.texts)["input_ids"])) // 2)

    def _wanted_tokens(self) -> int | None:
        if self.settings.steps is not None:
            return self.settings.steps * self._step_tokens()
        return self.settings.tokens

    def _step_tokens(self) -> int:
        own = self.settings
        return own.context * own.batch_size * own.accumulate * self.processes.count

    def _packed(
        self, folder: Path, name: str, corpus: Corpus, split: Any, tokens: int | None, context: int
    ) -> PackedTokens:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            exclude = [] if name == "evaluation" else [TextHashes.of(self.texts, "evaluation")]
            pack(
                corpus.documents(split, seed=self.settings.seed),
                self.tokenizer,
                context,
                tokens,
                name=name,
                source=corpus.source,
                exclude=exclude,
                progress=lambda done, total: self.progress(f"{name} text", done, total, {}) if tokens else None,
            ).save(path)
        return PackedTokens.load(path)

    # Training ------------------------------------------------------------------------------------------------------

    def steps(self) -> int:
        tokens = self._wanted_tokens() or self.rows.num_tokens
        return max(1, self.settings.steps or tokens // self._step_tokens())

    def arguments(self, folder: Path) -> TrainingArguments:
        own, steps = self.settings, self.steps()
        every = max(1, math.ceil(steps / CHECKPOINTS))
        return TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=own.batch_size,
            per_device_eval_batch_size=own.batch_size,
            gradient_accumulation_steps=own.accumulate,
            max_steps=steps,
            learning_rate=own.learning_rate,
            weight_decay=own.weight_decay,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=math.ceil(own.warmup * steps) if steps > 1 else 0,  # the first step of a warmup has rate 0
            dataloader_drop_last=len(self.rows) >= own.batch_size * self.processes.count,
            bf16=compute_dtype(self.dtype) == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_steps=every,
            eval_strategy="steps",
            eval_steps=every,
            prediction_loss_only=True,
            save_total_limit=2,
            seed=own.seed,
            data_seed=own.seed,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
            report_to=[],
            disable_tqdm=True,
        )

    def train(self) -> None:
        folder = self.run.folder / STAGE
        folder.mkdir(exist_ok=True)
        cls = causal_lm_class(architecture_of(self.config))
        set_seed(self.settings.seed)
        trainer = RowsTrainer(
            model=cls(self.config),
            args=self.arguments(folder),
            train_dataset=self.rows,
            eval_dataset=self.eval_rows,
            data_collator=rows_to_batch,
        )
        report_progress = lambda done, total, info: self.progress(STAGE, done, total, info)  # noqa: E731
        report = run_trainer(trainer, folder, self._step_tokens(), report_progress)
        measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        trainer.save_model(str(folder / "model"))  # gathers what is spread over devices
        if self.main:
            self._finish(folder, cls, report, measured[-1])

    def _finish(self, folder: Path, cls: type, report: dict[str, Any], held_out_loss: float) -> None:
        losses = [line["loss"] for line in read_metrics(folder)]
        if not math.isfinite(held_out_loss) or not math.isfinite(losses[-1]):
            raise RnnzooError("The loss is no longer a number; train again with --restart and a lower learning rate.")
        self.run.publish(cls.from_pretrained(folder / "model").to(self.dtype), self.tokenizer)
        report |= {
            "steps": self.steps(),
            "loss_last": sum(losses[-16:]) / len(losses[-16:]),
            "held_out_loss": held_out_loss,
            "perplexity": math.exp(held_out_loss),
        }
        self.run.finish(STAGE, None, report)
        self.run.finish(FINISHED, None, {})

    # Results -------------------------------------------------------------------------------------------------------

    def results(self, evaluate: bool) -> dict[str, Any]:
        """results.json, with `evaluate` the measurements, and the card."""
        held_out = {
            "sha256": TextHashes.of(self.texts, "evaluation").sha256,
            "source": self.eval_rows.source,
            "characters": sum(map(len, self.texts)),
        }
        results = write_training_results(
            self.run,
            self.config,
            architecture_of(self.config),
            self.dtype,
            self.run.record(STAGE) or {},
            {
                "seed": self.settings.seed,
                "settings": dataclasses.asdict(self.settings),
                "tokenizer": _public_name(self.run.request["tokenizer"]),
                "data": {"training": self.rows.record(), "evaluation": held_out},
            },
        )
        if evaluate:
            texts = [evaluation.Dataset.of_texts("held-out text", self.texts)]
            results = evaluation.evaluate(
                self.run.out, datasets=texts, limits="quick", dtype=self.dtype, progress=self.progress
            )
        render_card(self.run.out)
        return results


def _public_name(tokenizer: str | None) -> str:
    """What results.json and the card call it: of a folder its name, because its path is this machine's own."""
    if tokenizer is None:
        return "bytes"
    path = Path(tokenizer).expanduser()
    return path.resolve().name if path.is_dir() else tokenizer
