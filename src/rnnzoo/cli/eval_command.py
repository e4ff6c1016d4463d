"""`rnnzoo eval DIR`: measure a model, and its teacher beside it."""

from __future__ import annotations

import click

from .output import Output, output_options
from .progress import ProgressReport


@click.command("eval")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@click.option(
    "--against",
    metavar="TEACHER",
    help="Measure this teacher too, whole and cut to a window of as many bytes as DIR's state.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="Text, a book, or JSON lines of last-word or pair tasks; may be repeated.",
)
@output_options
def command(folder: str, against: str | None, data: tuple[str, ...], output: Output) -> None:
    """Measure the model in DIR; results.json and plots are written there.

    Perplexity, tasks, recall by distance, state bytes and decode speed, each with n and standard error.
    """
    with output.only_result_on_stdout(), ProgressReport(quiet=output.quiet) as progress:
        from ..conversions.evaluation.runner import evaluate

        results = evaluate(folder, teacher=against, datasets=list(data), out_dir=folder, progress=progress)
    from .results import show_results

    output.result(results, lambda console: show_results(results, folder, console))
