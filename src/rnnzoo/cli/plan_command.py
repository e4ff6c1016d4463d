"""`rnnzoo plan TEACHER`: what a conversion would do and cost, without loading weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .conversion_options import conversion_options
from .output import Output, output_options
from .quantities import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import Console


@click.command("plan")
@conversion_options
@click.option(
    "--devices", metavar="NxNAME", help="Memory, tokens/s and time on these, such as 8xH100, 1xA100 or 2xcpu."
)
@output_options
def command(output: Output, **options: Any) -> None:
    """Show what converting TEACHER would do: layer map, parameters, memory, state, tokens, time, licence.

    TEACHER as in `rnnzoo convert`, or a folder with its config.json alone. No weights are loaded.
    """
    from ..conversions.plan import make_plan

    with output.only_result_on_stdout():
        plan = make_plan(options.pop("teacher"), options.pop("recipe"), **options).to_dict()
    output.result(plan, lambda console: _show(plan, console))


def _show(plan: dict[str, Any], console: Console) -> None:
    """Single figures first, one a row, then every list of entries (the layers, the stages) as a table."""
    from rich.table import Table
    from rich.text import Text

    figures = Table(show_header=False, box=None, pad_edge=False)
    tables = []
    for name, key, value in _flatten(plan):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            tables.append((name, value))
        else:
            figures.add_row(Text(name, style="bold"), Text(_words(key, value)))
    console.print(figures)
    for name, entries in tables:
        columns = list(dict.fromkeys(key for entry in entries for key in entry))
        table = Table(title=name, title_justify="left", box=None, pad_edge=False)
        for column in columns:
            table.add_column(column.replace("_", " "))
        for entry in entries:
            table.add_row(*(Text(_words(column, entry.get(column))) for column in columns))
        console.print()
        console.print(table)


def _flatten(plan: dict[str, Any], prefix: str = "") -> list[tuple[str, str, Any]]:
    """(words of the row, key, value) of every leaf; {"state": {"bytes": 5}} is the row "state"."""
    rows = []
    for key, value in plan.items():
        path = f"{prefix}_{key}".strip("_")
        # The unit is in the value as it is shown: "4 MB".
        name = " ".join(word for word in path.split("_") if word not in ("bytes", "seconds"))
        rows += _flatten(value, path) if isinstance(value, dict) else [(name, path, value)]
    return rows


def _words(key: str, value: Any) -> str:
    """A value as people read it; its unit is in its key."""
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(_words("", item) for item in value) or "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if "bytes" in key:
        return format_bytes(value)
    if "seconds" in key:
        return format_seconds(value)
    if key.endswith("per_second"):
        return f"{format_count(round(value))}/s"
    if "parameters" in key or "tokens" in key:
        return format_count(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
