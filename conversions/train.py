"""`train`: an architecture of the zoo learns text from nothing, through transformers' Trainer.

The text is packed into rows of `context` tokens; a document never sees the one before it in its row. Killed at any
moment and called again with the same arguments, a run ends at the same weights. Under torchrun every process calls
`train`; the first of them writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from ..kernels.errors import RnnzooError
from ..zoo.core.sizes import causal_lm_class, layer_state_bytes, parameter_count, state_bytes, window_bytes
from .byte_tokenizer import byte_tokenizer
from .data import Corpus, PackedTokens, TextHashes, corpus_from_texts, open_corpus, pack
from .energy import check_energy, energy_record, measured_energy
from .memory import keep_freed_memory
from .processes import Processes
from .run import FINISHED, Run, alone_in, join_run, open_run, write_json
from .stages.training import CHECKPOINTS, Report, cut_metrics, newest_checkpoint, read_metrics
from .teachers.files import hub_reachable, user_errors
from .train_config import architecture_of, new_config

__all__ = ["TrainSettings", "train"]

log = logging.getLogger(__name__)
HELD_OUT_TOKENS = 100_000  # of the loss on held-out text, at most
HELD_OUT_CHARACTERS = 400_000
STAGE = "train"
Progress = Callable[[str, int, int, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        context: tokens in a sequence. batch_size: sequences in a batch of one process. accumulate: batches in a step.
        tokens: in all, texts that are shorter are read again; or steps: optimiser steps; neither: the text once.
        learning_rate: highest, after `warmup` (a share of the steps); it falls to a tenth of it along a cosine.
        weight_decay: of matrices; vectors, decay rates and norms have none.
        eval_fraction: share of the documents that is held out.
        dtype: "float32", or "bfloat16": autocast in training, and of the saved weights.
    """

    context: int = 512
    batch_size: int = 8
    accumulate: int = 1
    tokens: int | None = None
    steps: int | None = None
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    eval_fraction: float = 0.02
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.tokens is not None and self.steps is not None:
            raise RnnzooError("Say either tokens or steps, not both.")
        if not 0 < self.eval_fraction < 1:
            raise RnnzooError(f"The held-out share is {self.eval_fraction}; it must lie between 0 and 1.")
        if self.learning_rate <= 0 or self.context < 2 or min(self.batch_size, self.accumulate) < 1:
            raise RnnzooError("The learning rate must be above 0, the context at least 2, batch and accumulation 1.")
        if self.dtype not in ("float32", "bfloat16"):
            raise RnnzooError(f"dtype is {self.dtype!r}; expected bfloat16 or float32.")


def train(
    out: str | Path,
    data: list[str],
    *,
    arch: str | None = None,
    config: str | Path | None = None,
    size: str | None = None,
    fields: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    text_field: str = "text",
    eval_data: list[str] | None = None,
    settings: TrainSettings | None = None,
    restart: bool = False,
    evaluate: bool = True,
    energy: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a model from scratch; the same call goes on where a stopped one was.

    Args:
        out: folder of the result. data: as `open_corpus` takes it; eval_data: held-out text instead of a share of it.
        arch, config, size, fields: as `new_config` takes them.
        tokenizer: folder or Hub id; None: bytes.
        restart: discard an earlier run in `out`. evaluate: measure the result on the held-out text, as `convert` does.
        energy: ISO code of the country, such as "DEU": measure energy and CO2 of the training with CodeCarbon.
        progress: called as progress(stage, done tokens, all tokens, info).
    Returns:
        The contents of results.json.
    Raises:
        RnnzooError: bad input, as one sentence.
    """
    settings = settings or TrainSettings()
    check_energy(energy)
    keep_freed_memory()
    words = _tokenizer(tokenizer)
    fields = dict(fields or {})
    fields.setdefault("max_position_embeddings", max(2048, settings.context))
    made = new_config(arch, config, size, fields, words)
    corpus = open_corpus(data, text_field, tokenizer=words)
    endless = settings.tokens is None and settings.steps is None
    if endless and not all(Path(name).expanduser().exists() for name in data):
        raise RnnzooError("A data set of the Hub is streamed and has no end here; say how many tokens or steps.")
    held_out = open_corpus(eval_data, text_field, tokenizer=words) if eval_data else None
    request = {
        "architecture": architecture_of(made),
        "config": made.to_diff_dict(),
        "data": data,
        "eval_data": eval_data,
        "text_field": text_field,
        "tokenizer": tokenizer,
        "settings": dataclasses.asdict(settings),
    }
    processes = Processes()
    main = processes.main
    with contextlib.ExitStack() as stack:

        def prepared() -> tuple[Run, _Job]:
            if main:
                stack.enter_context(alone_in(out))
            run = open_run(out, request, restart) if main else join_run(out)
            if run.created:
                stack.enter_context(alone_in(out))
            job = _Job(
                run, made, words, corpus, held_out, settings, processes, (main and progress) or (lambda *_: None)
            )
            try:
                with user_errors(f"The training in {out} stopped, and the same command will go on with it"):
                    job.prepare()
            except RnnzooError:
                run.discard()
                raise
            if main:
                run.begin()
            return run, job

        run, job = processes.first(prepared)
        with user_errors(f"The training in {out} stopped, and the same command will go on with it"):
            if run.record(FINISHED) is None:
                with measured_energy(energy if main else None, run.folder):
                    job.run_trainer()
            return processes.only(lambda: job.results(evaluate)) or {}


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    there = Path(name).expanduser().is_dir()
    try:
        return AutoTokenizer.from_pretrained(
            name, local_files_only=there or not hub_reachable(), trust_remote_code=False
        )
    except Exception as error:  # the Hub and every kind of tokenizer have errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RnnzooError(f"{name} holds no tokenizer, as a folder or on the Hub: {reason}") from error


def _public_name(tokenizer: str | None) -> str:
    """What results.json and the card call it: of a folder its name, because its path is this machine's own."""
    if tokenizer is None:
        return "bytes"
    path = Path(tokenizer).expanduser()
    return path.resolve().name if path.is_dir() else tokenizer


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


class _Job:
    """One training under way."""

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
            write_json(path, self._held_out_texts())
        self.texts: list[str] = json.loads(path.read_text(encoding="utf-8"))
        folder = self.run.folder / "data"
        folder.mkdir(exist_ok=True)
        context = self.settings.context
        texts = corpus_from_texts(self.texts, (self.held_out or self.corpus).source)
        all_rows = self._packed(folder, "evaluation", texts, None, None, min(context, self._half_of_the_held_out()))
        self.eval_rows = all_rows.rows(0, max(1, min(len(all_rows), HELD_OUT_TOKENS // all_rows.seq_len)))
        split = None if self.held_out else "training"
        self.rows = self._packed(folder, "training", self.corpus, split, self._wanted_tokens(), context)

    def _held_out_texts(self) -> list[str]:
        texts, size = [], 0
        source = self.held_out or self.corpus
        for text in source.documents(None if self.held_out else "evaluation", seed=0):
            texts.append(text[:HELD_OUT_CHARACTERS])
            size += len(text)
            if size >= HELD_OUT_CHARACTERS:
                break
        return texts

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
        wanted = self._wanted_tokens() or self.rows.num_tokens
        return max(1, self.settings.steps or wanted // self._step_tokens())

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
            bf16=own.dtype == "bfloat16",
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

    def run_trainer(self) -> None:
        folder = self.run.folder / STAGE
        folder.mkdir(exist_ok=True)
        arguments = self.arguments(folder)
        cls = causal_lm_class(architecture_of(self.config))
        set_seed(self.settings.seed)
        model = cls(self.config)
        model.config.use_cache = False
        checkpoint = self.processes.first(lambda: newest_checkpoint(folder))
        if self.main:
            cut_metrics(folder, checkpoint)
        report = Report(folder, self._step_tokens(), lambda done, total, info: self.progress(STAGE, done, total, info))
        trainer = RowsTrainer(
            model=model,
            args=arguments,
            train_dataset=self.rows,
            eval_dataset=self.eval_rows,
            data_collator=rows_to_batch,
            callbacks=[report] if self.main else [],
        )
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                trainer.remove_callback(callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        if not measured:  # a run too short for any on the way
            measured = [trainer.evaluate()["eval_loss"]]
        trainer.save_model(str(folder / "model"))  # gathers what is spread over devices
        if self.main:
            self._finish(folder, cls, measured)

    def _finish(self, folder: Path, cls: type, measured: list[float]) -> None:
        lines = read_metrics(folder)
        if not math.isfinite(measured[-1]) or not math.isfinite(lines[-1]["loss"]):
            raise RnnzooError("The loss is no longer a number; train again with --restart and a lower learning rate.")
        model = cls.from_pretrained(folder / "model")
        model.config.use_cache = True
        self.run.publish(model.to(self.dtype), self.tokenizer)
        report = {
            "tokens": self.steps() * self._step_tokens(),
            "steps": self.steps(),
            "seconds": round(lines[-1]["seconds"], 1),
            "loss_first": lines[0]["loss"],
            "loss_last": sum(line["loss"] for line in lines[-16:]) / len(lines[-16:]),
            "held_out_loss": measured[-1],
            "perplexity": math.exp(measured[-1]),
        }
        self.run.finish(STAGE, None, report)
        self.run.finish(FINISHED, None, {})

    # Results -------------------------------------------------------------------------------------------------------

    def results(self, evaluate: bool) -> dict[str, Any]:
        """results.json, with `evaluate` the measurements, and the card."""
        path = self.run.out / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"schema": 1}
        results.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
        with contextlib.suppress(PackageNotFoundError):  # run from a source tree
            results["rnnzoo_version"] = version("rnnzoo")
        sha256 = TextHashes.of(self.texts, "evaluation").sha256
        held_out = {"sha256": sha256, "source": self.eval_rows.source, "characters": sum(map(len, self.texts))}
        results["model"] = (results.get("model") or {}) | {
            "name": self.run.out.resolve().name,
            "architecture": architecture_of(self.config),
            "model_type": self.config.model_type,
            "parameters": parameter_count(self.config),
            "dtype": self.settings.dtype,
            "layer_types": self.config.layer_types,
            "state_bytes": state_bytes(self.config, self.dtype) + window_bytes(self.config, self.dtype),
            "layer_state_bytes": layer_state_bytes(self.config, self.dtype),
        }
        record = self.run.record(STAGE) or {}
        results["training"] = {name: value for name, value in record.items() if name != "name"} | {
            "seed": self.settings.seed,
            "settings": dataclasses.asdict(self.settings),
            "tokenizer": _public_name(self.run.request["tokenizer"]),
            "hardware": f"{torch.get_num_threads()} threads, {platform.machine()}",
            "data": {"training": self.rows.record(), "evaluation": held_out},
            "energy": energy_record(self.run.folder),
        }
        write_json(path, results)
        from ..cards import render_card

        if evaluate:
            from .evaluation import Dataset
            from .evaluation import evaluate as measure

            texts = [Dataset.of_texts("held-out text", self.texts)]
            results = measure(self.run.out, datasets=texts, limits="quick", dtype=self.dtype, progress=self.progress)
        render_card(self.run.out)
        return results
