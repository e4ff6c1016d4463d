"""`evaluate`: every measure for every column, resumable, into results.json and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ...cards.plots import write_plots
from ...kernels.errors import RnnzooError
from ..teachers import TeacherRef
from .columns import COLUMNS, Opened, open_columns
from .harness import require_lm_eval
from .limits import Limits, limits_of
from .measures import Measures, longest
from .merging import PARTS, merge, still_valid
from .scoring import Progress, no_progress
from .store import Store, read_json, write_json
from .texts import Dataset, load_all
from .window_baseline import SINKS

__all__ = ["evaluate"]


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

    Every measured piece is kept in `out_dir`/evaluation.json under hashes of the model, data and settings, with the
    versions and the backend (speeds: and the processor): a second call measures only what is new. results.json keeps
    its other sections, and rows of the same models and versions that this call did not measure (another data set, a
    column left out).

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
    measuring = Measures(Store(out / "evaluation.json"), sizes, progress or no_progress, device)
    evaluation = results["evaluation"] = still_valid(results, opened, measuring.environment)
    merge(evaluation, _measure_all(measuring, opened, data, tuple(lm_eval)))
    described = {d.name: {"name": d.name, "kind": d.kind, "size": _size(d), "sha256": d.sha256} for d in data}
    known = {entry["name"]: entry for entry in evaluation.get("datasets", [])}
    evaluation["datasets"] = list((known | described).values())
    window = next((column for column in opened.columns if column.name == "window"), None)
    if window:
        context = max(sizes.windows)
        size = {"state_bytes": opened.state.at(context), "context": context}
        evaluation["window_baseline"] = {"window": window.window(context), "sinks": SINKS, **size}
    if sizes.sample_tokens:
        results["samples"] = measuring.samples(opened.student)
        results["snippet"] = measuring.example(opened.student, student_dir)
    _describe(results, opened, student_dir, measuring.environment)
    write_json(out / "results.json", results)
    write_plots(results, out)
    return results


def _measure_all(
    measuring: Measures, opened: Opened, data: list[Dataset], lm_eval: tuple[str, ...]
) -> dict[str, list[dict[str, Any]]]:
    texts = [d for d in data if d.kind in ("text", "long")]
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in PARTS}
    for column in opened.columns:
        # Books serve by position; they are a perplexity text only where nothing else is.
        for dataset in [d for d in texts if d.kind == "text"] or texts:
            parts["perplexity"] += measuring.perplexity(column, dataset)
        for dataset in data:
            if dataset.kind in ("last_word", "pairs"):
                parts["tasks"] += measuring.task(column, dataset)
        if lm_eval:
            parts["tasks"] += measuring.lm_eval(column, lm_eval)
        if texts:
            parts["by_position"] += measuring.by_position(column, longest(texts))
        parts["recall"] += measuring.recall(column, longest(texts) if texts else None)
        parts["recall_by_context"] += measuring.recall_by_context(column, longest(texts) if texts else None)
        parts["decode"] += measuring.decode(column)
        if column.name == "student":
            parts["parity"] += measuring.parity(column)
            parts["ablations"] += measuring.ablations(column, texts)
    return parts


def _size(dataset: Dataset) -> str:
    if dataset.items:
        return f"{len(dataset.items):,} items"
    return f"{len(dataset.documents):,} documents, {sum(len(d.encode()) for d in dataset.documents):,} bytes"


def _describe(results: dict[str, Any], opened: Opened, student_dir: Path, environment: dict[str, str]) -> None:
    """Fills what a conversion has not written already."""
    student = opened.student
    config = student.model.config
    results.setdefault("schema", 1)
    results["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    results["rnnzoo_version"] = environment.get("rnnzoo")
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
    results["environment"] = {**results.get("environment", {}), **environment}
