"""`rnnzoo plan TEACHER`: what a conversion would do and cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .conversion_options import conversion_options
from .output import Output, output_options
from .progress import ProgressReport
from .quantities import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

BARS = {"ranking layers": "swap_kl", "allocation layers": "bytes"}  # tables with a bar in each row, and of what
BAR = 24  # characters of the longest


@click.command("plan")
@conversion_options
@click.option(
    "--devices", metavar="NxNAME", help="Estimate memory, tokens/s and time on these, such as 8xH100, 1xA100 or 2xcpu."
)
@click.option(
    "--select",
    is_flag=True,
    help="Rank the layers by what their conversion costs, for `--keep best`; saved to --ranking, or to the cache.",
)
@click.option("--allocate", is_flag=True, help="Measure how the state budget would be divided, and draw it.")
@click.option(
    "--run",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Draw how the state budget was divided in the conversion in DIR.",
)
@click.option(
    "--data", multiple=True, metavar="SOURCE", help="Text for --select and --allocate, as in `rnnzoo convert`."
)
@click.option("--text-field", default="text", show_default=True, help="Field of JSON lines, parquet and datasets.")
@output_options
def command(output: Output, data: tuple[str, ...], **options: Any) -> None:
    """Show what converting TEACHER would do: layer map, parameters, memory, state, tokens, time, licence.

    TEACHER is given as in `rnnzoo convert`, or as a folder that holds only its config.json. Weights are loaded only by
    --select and --allocate, which take as long as a calibration.
    """
    from ..conversions.plan import make_plan

    with output.only_result_on_stdout(), ProgressReport(quiet=output.quiet) as progress:
        teacher, recipe = options.pop("teacher"), options.pop("recipe")
        plan = make_plan(teacher, recipe, data=list(data) or None, progress=progress, **options).to_dict()
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
        drawn = BARS.get(name)
        if drawn:
            table.add_column("")
        longest = max((entry.get(drawn) or 0 for entry in entries), default=0) or 1
        for entry in entries:
            bar = ["█" * round(BAR * (entry.get(drawn) or 0) / longest)] if drawn else []
            table.add_row(*(Text(_words(column, entry.get(column))) for column in columns), *map(Text, bar))
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
        return f"{format_count(float(f'{value:.3g}'))}/s"
    if "parameters" in key or "tokens" in key:
        return format_count(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
