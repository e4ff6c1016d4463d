"""The evaluation part of results.json as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .columns import COLUMNS

__all__ = ["show", "tables"]

_MISSING = "not measured"


def tables(results: dict[str, Any]) -> list[Table]:
    """One table for quality, then position, recall and decoding, as far as they were measured."""
    evaluation = results.get("evaluation", {})
    baseline = evaluation.get("window_baseline")
    label = f"window {baseline['window']}+{baseline['sinks']}" if baseline else "window"
    heads = ["student", "teacher", label]
    quality = _table("Quality", ["measure", "n", *heads])
    for keys, by in _grouped(evaluation.get("perplexity", []), "dataset", "window", "stride"):
        dataset, window, stride = keys
        name = f"{dataset}, perplexity, {window} tokens" + ("" if stride is None else f", stride {stride}")
        _add(quality, [name, f"{next(iter(by.values()))['n_tokens']:,}"], by, "value", "stderr", 2)
        _add(quality, ["  bits per byte", ""], by, "bits_per_byte", None, 3)
    for (task, metric), by in _grouped(evaluation.get("tasks", []), "task", "metric"):
        _add(quality, [f"{task}, {metric}", f"{next(iter(by.values()))['n']}"], by, "value", "stderr", 3)
    position = _table("Perplexity by position", ["tokens", *heads])
    for (start, end), by in _grouped(evaluation.get("by_position", []), "start", "end"):
        _add(position, [f"{start:,} to {end:,}"], by, "perplexity", None, 2)
    distance = _table("Recall (chance 0.10)", ["tokens back", "n", *heads])
    for (back,), by in _grouped(evaluation.get("recall", []), "distance"):
        _add(distance, [f"{back:,}", f"{next(iter(by.values()))['n']}"], by, "accuracy", "stderr", 2)
    late = _table("Recall late in a text (chance 0.10)", ["tokens before", "tokens back", "n", *heads])
    for (context, back), by in _grouped(evaluation.get("recall_by_context", []), "context", "distance"):
        n = f"{next(iter(by.values()))['n']}"
        _add(late, [f"{context:,}", f"{back:,}", n], by, "accuracy", "stderr", 2)
    alone = _table("Branches alone", ["branch", "perplexity", "recall by tokens back"])
    for row in evaluation.get("ablations", []):
        recalled = ", ".join(f"{back}: {value:.2f}" for back, value in row["recall"].items())
        alone.add_row(row["branch"], _shown(row["perplexity"], row["stderr"], 2), recalled)
    speed = _table("Decoding, tokens/s", ["context", *heads])
    state = _table("State, MB", ["context", *heads])
    for (context,), by in _grouped(evaluation.get("decode", []), "context"):
        _add(speed, [f"{context:,}"], by, "tokens_per_second", None, 1)
        megabytes = {name: {"mb": row["state_bytes"] / 1e6} for name, row in by.items()}
        _add(state, [f"{context:,}"], megabytes, "mb", None, 2)
    return [table for table in (quality, position, distance, late, alone, speed, state) if table.row_count]


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables."""
    console = console or Console()
    for table in tables(results):
        console.print(table)


def _table(title: str, heads: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index == 0 else "right")
    return table


def _add(table: Table, head: list[str], by: dict[str, Any], field: str, error: str | None, digits: int) -> None:
    cells = []
    for column in COLUMNS:
        row = by.get(column, {})
        cells.append(_shown(row.get(field), row.get(error) if error else None, digits))
    table.add_row(*head, *cells)


def _shown(value: float | None, spread: float | None, digits: int) -> str:
    text = _MISSING if value is None else f"{value:.{digits}f}"
    return text + (f" ± {spread:.{digits}f}" if value is not None and spread is not None else "")


def _grouped(rows: list[dict[str, Any]], *keys: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), {})[row["column"]] = row
    return list(groups.items())
