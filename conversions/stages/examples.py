"""The data of stages that do not read the training text: found, checked, and kept in the run's folder.

RUN/data/<stage>/          a dataset on disk: packed chats, or pairs
RUN/data/<stage>.json      what results.json says of it; written last
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.errors import RnnzooError
from ..data import TextHashes
from ..data.chats import Kind, chat_tokens, check_template, examples, kind_of_source
from ..run import write_json
from ..teachers.files import user_errors

if TYPE_CHECKING:
    from ..job import Job
    from ..recipes.stages import OwnData

__all__ = [
    "check_examples",
    "estimated_tokens",
    "load_examples",
    "prepare_examples",
    "row_order",
    "sources_of",
]

log = logging.getLogger(__name__)
KINDS: dict[str, Kind] = {"sft": "chat", "dpo": "preference"}
LOOKED_AT = 1000  # records that are looked at before a run begins


def sources_of(stage: OwnData, given: list[str] | None) -> list[str]:
    """Where the stage's data is: its own, or what was given and is of its kind.

    Raises:
        RnnzooError: there is none, or it cannot be read.
    """
    if stage.data is not None:
        return [stage.data]
    kind = KINDS[stage.kind]
    found = [source for source in given or [] if kind_of_source(source) == kind]
    if not found:
        raise RnnzooError(
            f"The stage {stage.name} needs {kind}s of its own, and none were given; name a source with --chat-data, or "
            "with `data:` in the recipe."
        )
    return found


def check_examples(stage: OwnData, given: list[str] | None) -> None:
    """Looks at the beginning of a stage's data.

    Raises:
        RnnzooError: as `examples`, and where a library that the stage needs is missing.
    """
    try:
        import datasets
        import trl  # noqa: F401
    except ImportError as error:
        raise RnnzooError(f"A stage of kind {stage.kind} needs trl: pip install 'rnnzoo[train]'.") from error
    datasets.disable_progress_bars()
    for _, _ in zip(range(LOOKED_AT), examples(sources_of(stage, given), KINDS[stage.kind]), strict=False):
        pass


def prepare_examples(job: Job, stage: OwnData) -> None:
    """Makes a stage's dataset, once; chats and pairs that share text with the evaluation are left out.

    Raises:
        RnnzooError: unreadable or wrong data, none that fits, or no chat template.
    """
    record = job.run.folder / "data" / f"{stage.name}.json"
    if record.exists():
        return
    import datasets

    datasets.disable_progress_bars()
    check_template(job.tokenizer, job.teacher.name)
    sources = sources_of(stage, job.chat_data)
    limit = int(job.recipe.tokens * stage.share / stage.epochs) if stage.share else None
    taken = _Taken(job, stage, limit)
    for example in examples(sources, KINDS[stage.kind], job.seed):
        if taken.full:
            break
        taken.add(example)
    if not taken.rows:
        raise RnnzooError(f"No {KINDS[stage.kind]} of {', '.join(sources)} is left for the stage {stage.name}.")
    dataset = _packed(datasets.Dataset.from_list(taken.rows), job) if stage.kind == "sft" else taken.dataset()
    folder = record.with_suffix("")
    partial = folder.with_name(f"{folder.name}.partial")
    record.parent.mkdir(exist_ok=True)
    with user_errors(f"The data of the stage {stage.name} cannot be saved in {folder}"):
        for old in (partial, folder):
            shutil.rmtree(old, ignore_errors=True)
        dataset.save_to_disk(str(partial))
        os.replace(partial, folder)
    write_json(record, taken.record(sources))


class _Taken:
    """Examples as rows of a dataset, up to a number of tokens."""

    def __init__(self, job: Job, stage: Any, limit: int | None):
        self.job, self.stage, self.limit = job, stage, limit
        self.evaluation = TextHashes.of(job.evaluation_texts, "evaluation")
        self.rows: list[dict[str, Any]] = []
        self.tokens = self.left_out = self.whole = 0
        self.digest = hashlib.sha256()

    @property
    def full(self) -> bool:
        return self.limit is not None and self.tokens >= self.limit

    def add(self, example: dict[str, Any]) -> None:
        turns = [turn for name in example for turn in example[name]]
        if self.evaluation.shares("\n\n".join(turn["content"] for turn in turns)):
            self.left_out += 1
            return
        longest = self.job.recipe.seq_len
        if self.stage.kind == "sft":
            ids, said = chat_tokens(example["messages"], self.job.tokenizer)
            if said is None or self.stage.loss_on == "all":
                self.whole += said is None
                said = [True] * len(ids)
            if not any(said[:longest]):
                self.left_out += 1
                return
            labels = [token if mine else -100 for token, mine in zip(ids, said, strict=True)]
            self.rows.append({"input_ids": ids[:longest], "labels": labels[:longest]})
            self.tokens += min(len(ids), longest)
        else:
            if not all(example[name] for name in _ANSWERS) or example["chosen"] == example["rejected"]:
                self.left_out += 1  # no preference in it: collections of them have a few such
                return
            sizes = [len(chat_tokens(example["prompt"] + example[name], self.job.tokenizer)[0]) for name in _ANSWERS]
            if max(sizes) > longest:  # cut short, two answers may be the same
                self.left_out += 1
                return
            self.rows.append(example)
            self.tokens += sum(sizes)
        self.digest.update(json.dumps(example, sort_keys=True).encode())

    def dataset(self) -> Any:
        from datasets import Dataset

        return Dataset.from_list(self.rows)

    def record(self, sources: list[str]) -> dict[str, Any]:
        if self.left_out:
            why = "too long, empty, or in the evaluation text"
            log.info("%d examples of the stage %s were left out: %s", self.left_out, self.stage.name, why)
        about = {"sha256": self.digest.hexdigest(), "tokens": self.tokens, "examples": len(self.rows)}
        about |= {"left_out": self.left_out, "source": ", ".join(Path(source).name for source in sources)}
        # Chats in which the template does not tell who speaks, so that the loss is on all of them.
        return about | ({"loss_on_all_of": self.whole} if self.whole else {})


_ANSWERS = ("chosen", "rejected")


def _packed(dataset: Any, job: Job) -> Any:
    """Rows of whole chats, `seq_lengths` tokens each; best fit puts the long ones first, so they are shuffled."""
    from trl import pack_dataset

    return pack_dataset(dataset, job.recipe.seq_len, "bfd").shuffle(seed=job.seed).flatten_indices()


def load_examples(job: Job, stage: OwnData) -> tuple[Any, dict[str, Any]]:
    """The dataset, in this process, and its record."""
    import datasets

    datasets.disable_progress_bars()
    folder = job.run.folder / "data" / stage.name
    record = json.loads(folder.with_name(f"{stage.name}.json").read_text(encoding="utf-8"))
    return datasets.load_from_disk(str(folder)), record


def row_order(rows: int, epochs: int, per_step: int, seed: int) -> list[int]:
    """Rows of all epochs, each in an order of its own; as many as fill whole steps."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    order = [n for _ in range(epochs) for n in torch.randperm(rows, generator=generator).tolist()]
    return order[: max(1, len(order) // per_step) * per_step]


def estimated_tokens(stage: OwnData, recipe: Any, given: list[str] | None) -> int | None:
    """Tokens that a stage will train on, at 4 characters each; None where its data is not known or not here.

    Raises:
        RnnzooError: data that is given and unreadable.
    """
    if not recipe.tokens:
        return 0
    share = int(recipe.tokens * stage.share) or None
    local = [source for source in ([stage.data] if stage.data else given or []) if Path(source).expanduser().exists()]
    local = [source for source in local if stage.data or kind_of_source(source) == KINDS[stage.kind]]
    if not local:
        return share
    characters = 0
    for example in examples(local, KINDS[stage.kind]):
        prompt = sum(len(turn["content"]) for turn in example.get("prompt", ())) * (len(_ANSWERS) - 1)
        characters += prompt + sum(len(turn["content"]) for turns in example.values() for turn in turns)
        if share is not None and characters >= 4 * share / stage.epochs:
            return share
    return characters // 4 * stage.epochs
