"""`rnnzoo eval DIR`: measure a model and, for comparison, its teacher."""

from __future__ import annotations

from typing import Any

import click

from .conversion_options import trust_option
from .output import Output, output_options
from .progress import ProgressReport

COLUMNS = ("student", "teacher", "window")


def _columns(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Some of the three columns, with commas between them."""
    names = None if value is None else tuple(value.replace(" ", "").split(","))
    if wrong := [name for name in names or () if name not in COLUMNS]:
        raise click.BadParameter(f"{wrong[0]!r} is no column; give some of {','.join(COLUMNS)}.")
    return names


@click.command("eval")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@click.option(
    "--against",
    metavar="TEACHER",
    help="Measure this teacher too: whole, and limited to a window of as many bytes as DIR's state.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="Text, a book, or JSON lines of last-word or pair tasks; may be repeated.",
)
@click.option(
    "--limits",
    type=click.Choice(["quick", "standard", "full"]),
    default="standard",
    show_default=True,
    help="How much to measure: a minute or two for a small model on a CPU, tens of minutes, or the whole files.",
)
@click.option(
    "--columns",
    metavar="NAMES",
    callback=_columns,
    help="Some of student,teacher,window; earlier measurements of the others are kept. Default: all.",
)
@click.option(
    "--lm-eval",
    "lm_eval",
    multiple=True,
    metavar="TASK",
    help="A task of the lm-eval harness (extra `eval`), such as piqa; may be repeated.",
)
@trust_option
@output_options
def command(
    folder: str,
    against: str | None,
    data: tuple[str, ...],
    columns: tuple[str, ...] | None,
    output: Output,
    **options: Any,
) -> None:
    """Measure the model in DIR; results.json and plots are written there.

    Perplexity, tasks, recall by distance, state bytes and decode speed, each with n and standard error. What was
    measured before with the same settings is not measured again. `rnnzoo card DIR` then writes the card.
    """
    if against is None and columns is not None and columns != ("student",):
        raise click.UsageError("The columns teacher and window need --against TEACHER.")
    if against is None:
        output.note("without --against TEACHER, only the model itself is measured")
    with output.only_result_on_stdout(), ProgressReport(quiet=output.quiet) as progress:
        from ..conversions.evaluation.runner import evaluate

        results = evaluate(
            folder, teacher=against, datasets=data, columns=columns or COLUMNS, progress=progress, **options
        )
    from .results import show_results

    output.result(results, lambda console: show_results(results, folder, console))
