"""What stages have in common that read data of their own: found, checked, and kept in the run's folder.

RUN/data/<stage>/          a dataset on disk: packed chats, or pairs
RUN/data/<stage>.json      what results.json says of it; written last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...kernels.errors import RnnzooError
from ..context import StageContext, StageRun
from ..data import TextHashes
from ..data.chats import Kind, check_template, examples, kind_of_source
from ..recipes import Recipe
from ..run_folder import write_json
from ..teachers import TeacherRef
from ..teachers.files import user_errors
from .end_to_end import EndToEnd, trainable
from .training import StageRules, leaves_unused, run_trainer, stage_arguments

__all__ = ["OwnData", "row_order"]

log = logging.getLogger(__name__)
LOOKED_AT = 1000  # records that are looked at before a run begins


@dataclass
class OwnData(EndToEnd):
    """What stages have that read chats or preferences of their own, not the training text.

    Attributes:
        data: a file, a folder or a Hub dataset; None: what `--chat-data` gives.
        share: of the recipe's tokens, as much of the data as these are; 0: all of it, `epochs` times.
    """

    own_rows: ClassVar[bool] = True
    reads: ClassVar[Kind]  # what an example is
    trains: str = "all"
    data: str | None = None

    def row(self, example: dict[str, Any], context: StageContext) -> tuple[dict[str, Any], int, dict[str, int]] | None:
        """An example as a row of the dataset, its tokens, and counts for the record; None: it is left out."""
        raise NotImplementedError

    def packed(self, dataset: Any, context: StageContext) -> Any:
        """The dataset as it is trained on."""
        return dataset

    # Before the run ------------------------------------------------------------------------------------------------

    def check_processes(self, recipe: Recipe, tokens: int, count: int) -> None:
        """How many rows it has is known when they are packed."""

    def check_inputs(
        self, recipe: Recipe, teacher: TeacherRef, chat_data: list[str] | None, look: bool
    ) -> dict[str, Any]:
        if not look or not recipe.tokens:
            return {}
        check_template(teacher.tokenizer(), teacher.name)
        try:
            import datasets
            import trl  # noqa: F401
        except ImportError as error:
            raise RnnzooError(f"A stage of kind {self.kind} needs trl: pip install 'rnnzoo[train]'.") from error
        datasets.disable_progress_bars()
        for _, _ in zip(range(LOOKED_AT), examples(self.sources(chat_data), self.reads), strict=False):
            pass
        return {}

    def reads_chat_data(self) -> bool:
        return self.data is None

    def sources(self, given: list[str] | None) -> list[str]:
        """Where its data is: its own, or what was given and is of its kind.

        Raises:
            RnnzooError: there is none, or it cannot be read.
        """
        if self.data is not None:
            return [self.data]
        found = [source for source in given or [] if kind_of_source(source) == self.reads]
        if not found:
            raise RnnzooError(
                f"The stage {self.name} needs {self.reads}s of its own, and none were given; name a source with "
                "--chat-data, or with `data:` in the recipe."
            )
        return found

    def takes(self, recipe: Recipe, rows: int) -> bool:
        return recipe.tokens > 0

    def tokens_read(self, recipe: Recipe, chat_data: list[str] | None = None) -> int | None:
        """At 4 characters each; None where the data is not known or not here."""
        if not recipe.tokens:
            return 0
        share = int(recipe.tokens * self.share) or None
        local = [source for source in ([self.data] if self.data else chat_data or []) if _is_here(source)]
        local = [source for source in local if self.data or kind_of_source(source) == self.reads]
        if not local:
            return share
        characters = 0
        for example in examples(local, self.reads):
            turns = [turn for name in example for turn in example[name]]
            turns += example.get("prompt", [])  # which goes before each of two answers
            characters += sum(len(turn["content"]) for turn in turns)
            if share is not None and characters >= 4 * share / self.epochs:
                return share
        return characters // 4 * self.epochs

    # Its dataset ---------------------------------------------------------------------------------------------------

    def prepare(self, context: StageContext) -> None:
        """Makes the dataset, once; examples that share text with the evaluation are left out.

        Raises:
            RnnzooError: unreadable or wrong data, none that fits, or no chat template.
        """
        record = context.folder / "data" / f"{self.name}.json"
        if record.exists() or not context.recipe.tokens:
            return
        import datasets

        datasets.disable_progress_bars()
        check_template(context.tokenizer, context.teacher.name)
        sources = self.sources(context.chat_data)
        rows, about = self._taken(sources, context)
        if not rows:
            raise RnnzooError(f"No {self.reads} of {', '.join(sources)} is left for the stage {self.name}.")
        dataset = self.packed(datasets.Dataset.from_list(rows), context)
        folder = record.with_suffix("")
        partial = folder.with_name(f"{folder.name}.partial")
        record.parent.mkdir(exist_ok=True)
        with user_errors(f"The data of the stage {self.name} cannot be saved in {folder}"):
            for old in (partial, folder):
                shutil.rmtree(old, ignore_errors=True)
            dataset.save_to_disk(str(partial))
            os.replace(partial, folder)
        write_json(record, about)

    def _taken(self, sources: list[str], context: StageContext) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows up to the stage's share of the tokens, and what results.json says of them."""
        limit = int(context.recipe.tokens * self.share / self.epochs) if self.share else None
        evaluation = TextHashes.of(context.evaluation_texts, "evaluation")
        rows, digest, left_out, tokens = [], hashlib.sha256(), 0, 0
        counts: dict[str, int] = {}
        for example in examples(sources, self.reads, context.seed):
            if limit is not None and tokens >= limit:
                break
            turns = [turn for name in example for turn in example[name]]
            shared = evaluation.shares("\n\n".join(turn["content"] for turn in turns))
            if shared or (taken := self.row(example, context)) is None:
                left_out += 1
                continue
            row, size, more = taken
            rows.append(row)
            tokens += size
            counts = {name: counts.get(name, 0) + count for name, count in more.items()}
            digest.update(json.dumps(example, sort_keys=True).encode())
        if left_out:
            why = "too long, empty, or in the evaluation text"
            log.info("%d examples of the stage %s were left out: %s", left_out, self.name, why)
        about = {"sha256": digest.hexdigest(), "tokens": tokens, "examples": len(rows), "left_out": left_out}
        about["source"] = ", ".join(Path(source).name for source in sources)
        return rows, about | {name: count for name, count in counts.items() if count}

    def load(self, context: StageContext) -> tuple[Any, dict[str, Any]]:
        """The dataset, in this process, and its record."""
        import datasets

        datasets.disable_progress_bars()
        folder = context.folder / "data" / self.name
        record = json.loads(folder.with_name(f"{self.name}.json").read_text(encoding="utf-8"))
        return datasets.load_from_disk(str(folder)), record

    # Training ------------------------------------------------------------------------------------------------------

    def learn(
        self,
        context: StageContext,
        student: Any,
        stage_run: StageRun,
        trl: tuple[Any, Any],
        dataset: Any,
        steps: int,
        tokens: int,
        **settings: Any,
    ) -> dict[str, Any]:
        """Trains the student in place by a trainer of TRL's; goes on from the newest whole checkpoint.

        Args:
            trl: classes of the trainer and of its configuration, which has these `settings`.
            dataset: rows in their order, which fill `steps`. tokens: of the whole stage.
        """
        folder = context.folder / stage_run.name
        common = stage_arguments(
            self, folder, steps, len(dataset) // steps, context.bf16, context.seed, context.checkpointing
        )
        with trainable(student, self, context.seed) as trains, quiet():
            trainer = _own_trainer(trl[0])(
                model=student,
                args=trl[1](**common, max_length=None, gradient_checkpointing=False, **settings),
                train_dataset=dataset,
                processing_class=context.tokenizer,
            )
            trainer.stage = self
            trainer.args.ddp_find_unused_parameters = leaves_unused(student)
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(trains(name))
            report_progress = lambda done, total, info: context.progress(stage_run.name, done, total, info)  # noqa: E731
            try:
                report = run_trainer(trainer, folder, tokens // steps, report_progress)
            finally:
                for name in ("forward", "_original_forward"):  # what TRL and accelerate have put around it
                    vars(student).pop(name, None)
        return report | {"tokens": tokens}


def _own_trainer(base: type) -> Any:
    """A trainer of TRL's with our learning rates and order of rows."""

    class Own(StageRules, base):
        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """The conversion writes one."""

    return Own


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


def row_order(rows: int, epochs: int, per_step: int, seed: int) -> list[int]:
    """Rows of all epochs, each in an order of its own; as many as fill whole steps."""
    generator = torch.Generator().manual_seed(seed)
    order = [n for _ in range(epochs) for n in torch.randperm(rows, generator=generator).tolist()]
    return order[: max(1, len(order) // per_step) * per_step]


def _is_here(source: str) -> bool:
    return Path(source).expanduser().exists()
