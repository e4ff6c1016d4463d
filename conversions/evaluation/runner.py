"""`evaluate`: every measure for every column, resumable, into results.json and plots."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...cards.commands import snippet_code
from ...cards.plots import write_plots
from ...kernels.errors import RnnzooError
from ..teachers import TeacherRef
from .ablations import ablation, branches
from .columns import COLUMNS, Column, Opened, open_columns
from .decode import decode, device_name
from .harness import lm_eval_tasks, require_lm_eval
from .limits import Limits, limits_of
from .merging import PARTS, merge, still_valid
from .parity import parity
from .perplexity import POSITION_EDGES, by_position, perplexity
from .recall import recall
from .samples import run_example, sample
from .scoring import Progress, no_progress
from .store import Store, read_json, write_json
from .tasks import last_word, minimal_pairs
from .texts import Dataset, load_all
from .window_baseline import SINKS

__all__ = ["environment", "evaluate"]

_ABLATION_DISTANCE = 1024  # recall of single branches is measured up to here
_VERSION = 1  # raise it when a measure changes its meaning: stored pieces of older versions are then measured again


def evaluate(
    student_dir: str | Path,
    *,
    teacher: str | Path | TeacherRef | None = None,
    datasets: Iterable[str | Path | Dataset] = (),
    out_dir: str | Path | None = None,
    columns: Sequence[str] = COLUMNS,
    limits: str | Limits = "standard",
    lm_eval: Sequence[str] = (),
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a model, beside its teacher and the teacher cut to a window of the same state bytes.

    Every measured piece is kept in `out_dir`/evaluation.json under hashes of the model, data and settings: a second
    call measures only what is new. results.json keeps its other sections, and rows of the same models that this call
    did not measure (another data set, a column left out).

    Args:
        student_dir: a folder that AutoModelForCausalLM loads.
        teacher: whatever `resolve_teacher` takes, or its result; None: the student alone.
        datasets: files, folders or `Dataset`s (see `texts`). Recall and decoding need none.
        out_dir: where results.json, evaluation.json and plots/ go; default the student's folder.
        columns: some of "student", "teacher", "window".
        limits: "quick", "standard", "full", or a `Limits`.
        lm_eval: names of lm-eval tasks to run besides.
        device: default CUDA where there is one, else the CPU.
        trust_remote_code: run modelling code that lies in `student_dir`.
        progress: called as progress(what, done, total, info).
    Returns:
        The whole of results.json.
    Raises:
        RnnzooError: bad input, as one sentence.
    """
    student_dir = Path(student_dir)
    out = Path(out_dir) if out_dir is not None else student_dir
    sizes = limits_of(limits)
    if lm_eval:
        require_lm_eval(lm_eval)
    results = read_json(out / "results.json")
    if results.get("schema", 1) != 1:
        raise RnnzooError(
            f"{out / 'results.json'} has schema {results['schema']}, expected 1: it is of another version."
        )
    data = load_all(datasets)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    opened = open_columns(
        student_dir, teacher, tuple(columns), dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    measuring = _Measuring(Store(out / "evaluation.json"), sizes, progress or no_progress, device)
    evaluation = results["evaluation"] = still_valid(results.get("evaluation") or {}, opened)
    merge(evaluation, _measure_all(measuring, opened, data, tuple(lm_eval)))
    described = {d.name: {"name": d.name, "kind": d.kind, "size": _size(d), "sha256": d.sha256} for d in data}
    known = {entry["name"]: entry for entry in evaluation.get("datasets", [])}
    evaluation["datasets"] = list((known | described).values())
    window = next((column for column in opened.columns if column.name == "window"), None)
    if window:
        context = max(sizes.windows)
        evaluation["window_baseline"] = {
            "window": window.window(context),
            "sinks": SINKS,
            "state_bytes": opened.state.at(context),
            "context": context,
        }
    if sizes.sample_tokens:
        results["samples"] = measuring.samples(opened.student)
        results["snippet"] = measuring.example(opened.student, student_dir)
    _describe(results, opened, student_dir, device)
    write_json(out / "results.json", results)
    write_plots(results, out)
    return results


def _measure_all(
    measuring: _Measuring, opened: Opened, data: list[Dataset], lm_eval: tuple[str, ...]
) -> dict[str, list[dict[str, Any]]]:
    texts = [d for d in data if d.kind in ("text", "long")]
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in PARTS}
    for column in opened.columns:
        # Books serve by position; they are a perplexity text only where nothing else is.
        for dataset in [d for d in texts if d.kind == "text"] or texts:
            parts["perplexity"] += measuring.perplexity(column, dataset)
        for dataset in data:
            if dataset.kind in ("last_word", "pairs"):
                parts["tasks"].append(measuring.task(column, dataset))
        if lm_eval:
            parts["tasks"] += measuring.lm_eval(column, lm_eval)
        if texts:
            parts["by_position"] += measuring.by_position(column, _longest(texts))
        parts["recall"] += measuring.recall(column, _longest(texts) if texts else None)
        parts["recall_by_context"] += measuring.recall_by_context(column, _longest(texts) if texts else None)
        parts["decode"] += measuring.decode(column)
        if column.name == "student":
            parts["parity"] += measuring.parity(column)
            parts["ablations"] += measuring.ablations(column, texts)
    return parts


def _longest(texts: list[Dataset]) -> Dataset:
    """A book if there is one, else the longest text."""
    return max(texts, key=lambda d: (d.kind == "long", len(_long_text(d))))


def _long_text(dataset: Dataset) -> str:
    return max(dataset.documents, key=len) if dataset.kind == "long" else dataset.text


def _size(dataset: Dataset) -> str:
    if dataset.items:
        return f"{len(dataset.items):,} items"
    return f"{len(dataset.documents):,} documents, {sum(len(d.encode()) for d in dataset.documents):,} bytes"


class _Measuring:
    """The measures with their settings, each looked up in the store first. Rows are results.json's."""

    def __init__(self, store: Store, limits: Limits, progress: Progress, device: torch.device):
        self.store, self.limits, self.progress, self.device = store, limits, progress, device

    def _stored(self, column: Column, measure: str, context: int, settings: dict[str, Any], data: str, run: Any) -> Any:
        key = {
            "version": _VERSION,
            "column": column.name,
            "measure": measure,
            "settings": {**settings, **column.settings(context), "dtype": str(column.model.dtype)},
            "data": data,
            "model": column.sha256,
        }

        def report(what: str, done: int, total: int, info: dict[str, Any]) -> None:
            self.progress(f"{column.name}: {what}", done, total, info)

        def measured() -> Any:
            with column.at(context) as (model, tokenizer):
                return run(model, tokenizer, report)

        return self.store.get(key, measured)

    def perplexity(self, column: Column, dataset: Dataset) -> list[dict[str, Any]]:
        rows = []
        limit = self.limits.perplexity_tokens
        for window, stride in [*((w, None) for w in self.limits.windows), *self.limits.strided]:
            settings = {"window": window, "stride": stride, "max_tokens": limit}
            value = self._stored(
                column,
                "perplexity",
                window,
                settings,
                dataset.sha256,
                lambda model, tokenizer, report, w=window, s=stride: perplexity(
                    model, tokenizer, dataset.text, window=w, stride=s, max_tokens=limit, progress=report
                ).to_dict(),
            )
            rows.append({"dataset": dataset.name, "column": column.name, **value, **column.settings(window)})
        return rows

    def task(self, column: Column, dataset: Dataset) -> dict[str, Any]:
        measure = last_word if dataset.kind == "last_word" else minimal_pairs
        context, limit = max(self.limits.windows), self.limits.task_items
        value = self._stored(
            column,
            dataset.kind,
            context,
            {"max_items": limit},
            dataset.sha256,
            lambda model, tokenizer, report: measure(
                model, tokenizer, dataset.items, max_items=limit, progress=report
            ).to_dict(),
        )
        return {"task": dataset.name, "column": column.name, **value, **column.settings(context)}

    def lm_eval(self, column: Column, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
        context, limit = max(self.limits.windows), self.limits.task_items
        rows = self._stored(
            column,
            "lm_eval",
            context,
            {"tasks": list(tasks), "max_items": limit},
            "",
            lambda model, tokenizer, report: lm_eval_tasks(model, tokenizer, tasks, max_items=limit),
        )
        return [{**row, "column": column.name, **column.settings(context)} for row in rows]

    def by_position(self, column: Column, dataset: Dataset) -> list[dict[str, Any]]:
        length = column.reaches(self.limits.position_tokens)
        if column.positions is not None:
            length = min(length, self.limits.teacher_position_tokens or 2 * column.positions)
        edges = sorted(
            {0, *(e for e in POSITION_EDGES if e < self.limits.position_tokens), self.limits.position_tokens}
        )
        buckets = self._stored(
            column,
            "by_position",
            self.limits.position_tokens,
            {"tokens": length, "edges": edges},
            dataset.sha256,
            lambda model, tokenizer, report: [
                {"start": b.start, "end": b.end, "perplexity": b.perplexity, "n_tokens": b.n_tokens}
                for b in by_position(
                    model,
                    tokenizer,
                    _long_text(dataset),
                    max_tokens=length,
                    edges=edges,
                    chunk=self.limits.chunk,
                    progress=report,
                )
            ],
        )
        own = column.settings(self.limits.position_tokens)
        return [{**bucket, "column": column.name, "dataset": dataset.name, **own} for bucket in buckets]

    def recall(self, column: Column, dataset: Dataset | None) -> list[dict[str, Any]]:
        """The window column's bytes are the student's at the furthest distance."""
        limits = self.limits
        if not limits.distances:
            return []
        context = column.reaches(max(limits.distances))
        distances = [d for d in limits.distances if d <= context]
        settings = {"distances": distances, "facts": limits.facts, "streams": limits.streams}
        points = self._stored(
            column,
            "recall",
            max(limits.distances),
            settings,
            dataset.sha256 if dataset else "made up",
            lambda model, tokenizer, report: [
                point.to_dict()
                for point in recall(
                    model,
                    tokenizer,
                    filler=_long_text(dataset) if dataset else None,
                    **settings,
                    chunk=limits.chunk,
                    progress=report,
                )
            ],
        )
        own = column.settings(max(limits.distances))
        return [{**point, "column": column.name, **own} for point in points]

    def recall_by_context(self, column: Column, dataset: Dataset | None) -> list[dict[str, Any]]:
        """Recall of facts that come late; the window column's bytes are the student's there."""
        limits, rows = self.limits, []
        for context in limits.recall_contexts if limits.context_distances else ():
            end = context + max(limits.context_distances)
            if column.reaches(end) < end:
                continue
            settings = {"distances": list(limits.context_distances), "facts": limits.facts, "streams": 1}
            points = self._stored(
                column,
                "recall",
                end,
                settings | {"lead": context},
                dataset.sha256 if dataset else "made up",
                lambda model, tokenizer, report, lead=context, settings=settings: [
                    point.to_dict()
                    for point in recall(
                        model,
                        tokenizer,
                        filler=_long_text(dataset) if dataset else None,
                        **settings,
                        lead=lead,
                        chunk=limits.chunk,
                        progress=report,
                    )
                ],
            )
            rows += [{"context": context, **point, "column": column.name, **column.settings(end)} for point in points]
        return rows

    def ablations(self, column: Column, texts: list[Dataset]) -> list[dict[str, Any]]:
        """The whole, then each branch alone; nothing for a model without branches."""
        limits, found = self.limits, branches(column.model)
        if not found or not limits.ablation_tokens or not texts:
            return []
        dataset = next((d for d in texts if d.kind == "text"), texts[0])
        rows = []
        for branch in (None, *found):
            settings = {
                "window": max(limits.windows),
                "max_tokens": limits.ablation_tokens,
                "distances": [d for d in limits.distances if d <= _ABLATION_DISTANCE],
                "facts": limits.facts,
            }
            value = self._stored(
                column,
                "ablation",
                0,
                settings | {"branch": branch},
                dataset.sha256,
                lambda model, tokenizer, report, branch=branch, settings=settings: ablation(
                    model, tokenizer, branch, text=dataset.text, **settings, chunk=limits.chunk, progress=report
                ),
            )
            rows.append({"column": column.name, "branch": branch or "whole", "dataset": dataset.name, **value})
        return rows

    def parity(self, column: Column) -> list[dict[str, Any]]:
        """On prose of its own, the same for every model."""
        context, steps = self.limits.parity_context, self.limits.parity_steps
        if not steps:
            return []
        value = self._stored(
            column,
            "parity",
            context,
            {"context": context, "steps": steps},
            "",
            lambda model, tokenizer, report: parity(
                model, tokenizer, context=context, steps=steps, progress=report
            ).to_dict(),
        )
        return [{"column": column.name, **value}]

    def decode(self, column: Column) -> list[dict[str, Any]]:
        """Each context apart where the window depends on it."""
        limits = self.limits
        groups = [[c] for c in limits.contexts] if column.budget and column.budget.per_token else [limits.contexts]
        rows = []
        for contexts in groups if limits.contexts else []:
            points = self._stored(
                column,
                "decode",
                max(contexts),
                {"contexts": list(contexts), "steps": limits.decode_steps, "device": device_name(self.device)},
                "",
                lambda model, tokenizer, report, contexts=contexts: [
                    point.to_dict()
                    for point in decode(
                        model, contexts=contexts, steps=limits.decode_steps, chunk=limits.chunk, progress=report
                    )
                ],
            )
            rows += [{**point, "column": column.name, **column.settings(max(contexts))} for point in points]
        return rows

    def samples(self, column: Column) -> list[dict[str, str]]:
        tokens = self.limits.sample_tokens
        return self._stored(
            column,
            "samples",
            0,
            {"max_new_tokens": tokens},
            "",
            lambda model, tokenizer, report: sample(model, tokenizer, max_new_tokens=tokens),
        )

    def example(self, column: Column, folder: Path) -> dict[str, str]:
        """The card's example and what it prints, from a model loaded anew, as its reader will load it."""
        code = snippet_code(chat=bool(column.tokenizer.chat_template), max_new_tokens=self.limits.sample_tokens)
        return self._stored(column, "example", 0, {"code": code}, "", lambda *_: run_example(folder, code))


def _describe(results: dict[str, Any], opened: Opened, student_dir: Path, device: torch.device) -> None:
    """Fills what a conversion has not written already."""
    student = opened.student
    config = student.model.config
    results.setdefault("schema", 1)
    results["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    results["rnnzoo_version"] = _version("rnnzoo")
    model = results.setdefault("model", {})
    model.setdefault("name", student_dir.resolve().name)
    model.setdefault("architecture", type(student.model).__name__)
    model.setdefault("model_type", config.model_type)
    model.setdefault("parameters", student.model.num_parameters())
    model.setdefault("dtype", str(student.model.dtype).removeprefix("torch."))
    model.setdefault("layer_types", list(getattr(config, "layer_types", None) or []))
    # What is constant; layers that are attention add to it with every token.
    model["state_bytes"], model["state_bytes_per_token"] = opened.state.fixed, opened.state.per_token
    model["chat_template"] = bool(student.tokenizer.chat_template)
    if opened.teacher:
        results["teacher"] = {**opened.teacher, **results.get("teacher", {})}
    results["environment"] = {**results.get("environment", {}), **environment(device)}


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware of this process."""
    names = ("rnnzoo", "torch", "transformers", "tokenizers", "safetensors", "lm-eval")
    found = {name: _version(name) for name in names}
    return {
        "python": platform.python_version(),
        **{name: value for name, value in found.items() if value},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device_name(device),
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
