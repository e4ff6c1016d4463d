"""The measures of an evaluation, each as rows of results.json; what is stored already is not measured again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...cards.commands import snippet_code
from .ablations import ablation, branches
from .columns import Column
from .decode import decode
from .environment import QUALITY, SPEED, conditions, environment
from .harness import lm_eval_tasks
from .limits import Limits
from .parity import parity
from .perplexity import POSITION_EDGES, by_position, perplexity
from .recall import recall
from .samples import run_example, sample
from .scoring import Progress
from .store import Store
from .tasks import last_word, minimal_pairs
from .texts import Dataset

__all__ = ["Measures", "longest"]

_ABLATION_DISTANCE = 1024  # recall of single branches is measured up to here
_VERSION = 1  # raise it when a measure changes its meaning: stored pieces of older versions are then measured again


def longest(texts: list[Dataset]) -> Dataset:
    """A book if there is one, else the longest text."""
    return max(texts, key=lambda d: (d.kind == "long", len(_long_text(d))))


def _long_text(dataset: Dataset) -> str:
    return max(dataset.documents, key=len) if dataset.kind == "long" else dataset.text


class Measures:
    """The measures with their settings, each looked up in the store first."""

    def __init__(self, store: Store, limits: Limits, progress: Progress, device: torch.device):
        self.store, self.limits, self.progress, self.device = store, limits, progress, device
        self.environment = environment(device)

    def _rows(
        self,
        column: Column,
        measure: str,
        context: int,
        settings: dict[str, Any],
        data: Dataset | str,
        run: Callable[..., Any],
        /,
        **about: Any,
    ) -> list[dict[str, Any]]:
        """The rows of what `run(model, tokenizer, progress=...)` gives, one dataclass or dictionary or several.

        Args:
            context: tokens that the window column's bytes are counted at. settings: whatever `run` depends on.
            about: what else the rows say.
        """
        own = column.settings(context)
        key = {
            "version": _VERSION,
            "column": column.name,
            "measure": measure,
            "settings": {**settings, **own, "dtype": str(column.model.dtype)},
            "data": data if isinstance(data, str) else data.sha256,
            "model": column.sha256,
            "measured with": conditions(self.environment, SPEED if measure == "decode" else QUALITY),
        }

        def report(what: str, done: int, total: int, info: dict[str, Any]) -> None:
            self.progress(f"{column.name}: {what}", done, total, info)

        def measured() -> list[dict[str, Any]]:
            with column.at(context) as (model, tokenizer):
                found = run(model, tokenizer, progress=report)
            several = found if isinstance(found, list) else [found]
            return [value if isinstance(value, dict) else asdict(value) for value in several]

        return [{**about, **row, "column": column.name, **own} for row in self.store.get(key, measured)]

    def perplexity(self, column: Column, dataset: Dataset) -> list[dict[str, Any]]:
        limits, rows = self.limits, []
        for window, stride in [*((w, None) for w in limits.windows), *limits.strided]:
            own = {"window": window, "stride": stride, "max_tokens": limits.perplexity_tokens}
            run = partial(perplexity, text=dataset.text, **own)
            rows += self._rows(column, "perplexity", window, own, dataset, run, dataset=dataset.name)
        return rows

    def task(self, column: Column, dataset: Dataset) -> list[dict[str, Any]]:
        measure = last_word if dataset.kind == "last_word" else minimal_pairs
        own, context = {"max_items": self.limits.task_items}, max(self.limits.windows)
        run = lambda *pair, progress: measure(*pair, dataset.items, **own, progress=progress).to_dict()  # noqa: E731
        return self._rows(column, dataset.kind, context, own, dataset, run, task=dataset.name)

    def lm_eval(self, column: Column, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
        own = {"max_items": self.limits.task_items, "tasks": list(tasks)}
        run = lambda model, tokenizer, progress: lm_eval_tasks(model, tokenizer, **own)  # noqa: E731
        return self._rows(column, "lm_eval", max(self.limits.windows), own, "", run)

    def by_position(self, column: Column, dataset: Dataset) -> list[dict[str, Any]]:
        limits, end = self.limits, self.limits.position_tokens
        length = column.reaches(end)
        if column.positions is not None:
            length = min(length, limits.teacher_position_tokens or 2 * column.positions)
        own = {"max_tokens": length, "edges": sorted({0, *(edge for edge in POSITION_EDGES if edge < end), end})}
        run = partial(by_position, text=_long_text(dataset), **own, chunk=limits.chunk)
        return self._rows(column, "by_position", end, own, dataset, run, dataset=dataset.name)

    def recall(self, column: Column, dataset: Dataset | None) -> list[dict[str, Any]]:
        """The window column's bytes are the student's at the furthest distance."""
        limits = self.limits
        if not limits.distances:
            return []
        end = max(limits.distances)
        context = column.reaches(end)
        distances = [distance for distance in limits.distances if distance <= context]
        own = {"distances": distances, "facts": limits.facts, "streams": limits.streams}
        return self._recall(column, end, own, dataset)

    def recall_by_context(self, column: Column, dataset: Dataset | None) -> list[dict[str, Any]]:
        """Recall of facts that come late; the window column's bytes are the student's there."""
        limits, rows = self.limits, []
        for context in limits.recall_contexts if limits.context_distances else ():
            end = context + max(limits.context_distances)
            if column.reaches(end) < end:
                continue
            own = {"distances": list(limits.context_distances), "facts": limits.facts, "streams": 1, "lead": context}
            rows += self._recall(column, end, own, dataset, context=context)
        return rows

    def _recall(
        self, column: Column, end: int, own: dict[str, Any], dataset: Dataset | None, **about: Any
    ) -> list[dict[str, Any]]:
        run = partial(recall, filler=_long_text(dataset) if dataset else None, **own, chunk=self.limits.chunk)
        return self._rows(column, "recall", end, own, dataset or "made up", run, **about)

    def ablations(self, column: Column, texts: list[Dataset]) -> list[dict[str, Any]]:
        """The whole, then each branch alone; nothing for a model without branches."""
        limits, found = self.limits, branches(column.model)
        if not found or not limits.ablation_tokens or not texts:
            return []
        dataset = next((d for d in texts if d.kind == "text"), texts[0])
        own = {
            "window": max(limits.windows),
            "max_tokens": limits.ablation_tokens,
            "distances": [d for d in limits.distances if d <= _ABLATION_DISTANCE],
            "facts": limits.facts,
        }
        rows = []
        for branch in (None, *found):
            run = partial(ablation, branch=branch, text=dataset.text, **own, chunk=limits.chunk)
            about = {"branch": branch or "whole", "dataset": dataset.name}
            rows += self._rows(column, "ablation", 0, own | {"branch": branch}, dataset, run, **about)
        return rows

    def parity(self, column: Column) -> list[dict[str, Any]]:
        """On prose of its own, the same for every model."""
        own = {"context": self.limits.parity_context, "steps": self.limits.parity_steps}
        if not own["steps"]:
            return []
        return self._rows(column, "parity", own["context"], own, "", partial(parity, **own))

    def decode(self, column: Column) -> list[dict[str, Any]]:
        """Each context apart where the window depends on it."""
        limits = self.limits
        groups = [[c] for c in limits.contexts] if column.budget and column.budget.per_token else [limits.contexts]
        rows = []
        for contexts in groups if limits.contexts else []:
            own = {"contexts": list(contexts), "steps": limits.decode_steps}
            run = lambda model, _, progress, own=own: decode(  # noqa: E731
                model, **own, chunk=limits.chunk, progress=progress
            )
            rows += self._rows(column, "decode", max(contexts), own, "", run)
        return rows

    def samples(self, column: Column) -> list[dict[str, str]]:
        own = {"max_new_tokens": self.limits.sample_tokens}
        rows = self._rows(column, "samples", 0, own, "", lambda *pair, progress: sample(*pair, **own))
        return [{"prompt": row["prompt"], "output": row["output"]} for row in rows]

    def example(self, column: Column, folder: Path) -> dict[str, str]:
        """The card's example and what it prints, from a model loaded anew, as its reader will load it."""
        code = snippet_code(chat=bool(column.tokenizer.chat_template), max_new_tokens=self.limits.sample_tokens)
        (row,) = self._rows(column, "example", 0, {"code": code}, "", lambda *_, progress: run_example(folder, code))
        return {name: row[name] for name in ("code", "output") if name in row}
