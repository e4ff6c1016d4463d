"""What `convert` and `eval` print at the end: the main figures of results.json, one column a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .quantities import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["show_results"]


def show_results(results: dict[str, Any], folder: str, console: Console) -> None:
    """Draw the main figures of `results` (results.json as read); what was not measured is left out."""
    from rich.text import Text

    model, conversion = results.get("model", {}), results.get("conversion", {})
    if model.get("parameters"):
        state = f", {format_bytes(model['state_bytes'])} of state" if model.get("state_bytes") else ""
        if model.get("state_bytes_per_token"):
            state += f" and {format_bytes(model['state_bytes_per_token'])} for each token of context"
        console.print(
            Text(f"{model.get('model_type', 'model')}, {format_count(model['parameters'])} parameters{state}")
        )
    if conversion.get("tokens"):
        spent = f"{format_count(conversion['tokens'])} tokens in {format_seconds(conversion.get('seconds', 0))}"
        console.print(Text(f"converted with {spent}"))
    if training := results.get("training"):
        spent = f"{format_count(training['tokens'])} tokens in {format_seconds(training['seconds'])}"
        found = f"loss {training['held_out_loss']:.4g}, perplexity {training['perplexity']:.4g}"
        console.print(Text(f"trained on {spent}; held-out text: {found}"))
    evaluation = results.get("evaluation") or {}
    if any(_rows(evaluation)):
        console.print(_table(evaluation))
    console.print(Text(folder, style="bold"), soft_wrap=True)


def _table(evaluation: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    cells: dict[str, dict[str, str]] = {}
    for row, column, words in _rows(evaluation):
        cells.setdefault(row, {})[column] = words
    present = {column for row in cells.values() for column in row}
    columns = [column for column in ("student", "teacher", "window") if column in present]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row, values in cells.items():
        table.add_row(Text(row), *(Text(values.get(column, "-")) for column in columns))
    return table


def _rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(row, column, cell) of every measure."""
    rows = []
    for entry in evaluation.get("perplexity") or []:
        name = f"perplexity, {entry['dataset']}, {entry['window']}-token windows"
        if entry.get("stride") not in (None, entry["window"]):
            name += f", stride {entry['stride']}"
        rows.append((name, entry["column"], _figure(entry["value"], entry.get("stderr"))))
    for entry in evaluation.get("tasks") or []:
        name = f"{entry['task']}, {entry['metric']} (n = {entry['n']})"
        rows.append((name, entry["column"], _figure(entry["value"], entry.get("stderr"))))
    for entry in evaluation.get("recall") or []:
        name = f"recall {entry['distance']} tokens back (n = {entry['n']})"
        rows.append((name, entry["column"], _figure(entry["accuracy"], entry.get("stderr"))))
    for entry in evaluation.get("decode") or []:
        context = format_count(entry["context"])
        rows.append((f"tokens/s at {context} of context", entry["column"], _figure(entry["tokens_per_second"], None)))
        rows.append((f"state at {context} of context", entry["column"], format_bytes(entry["state_bytes"])))
    return [(row, column, words) for row, column, words in rows if words]


def _figure(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" + (f" ± {stderr:.2g}" if stderr is not None else "")
