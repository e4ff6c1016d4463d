"""`rnnzoo train --arch X --data TEXT --out DIR`: a model from scratch; the same command resumes a stopped run."""

from __future__ import annotations

from typing import Any

import click

from .conversion_options import energy_option
from .output import Output, output_options
from .progress import ProgressReport
from .quantities import COUNT


@click.command("train")
@click.option("--arch", metavar="NAME", help="Architecture of the zoo (see `rnnzoo list`).")
@click.option("--config", metavar="FILE", type=click.Path(), help="A config.json of the zoo, instead of --arch.")
@click.option("--size", metavar="NAME", help="A published size, such as 130M (see `rnnzoo list --sizes`).")
@click.option("--hidden-size", type=click.IntRange(min=1), metavar="N", help="Width of the model.")
@click.option("--layers", type=click.IntRange(min=1), metavar="N", help="Number of layers.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="A field of the config; repeatable.")
@click.option(
    "--data", multiple=True, required=True, metavar="SOURCE",
    help="Text, JSON lines, parquet, a folder, or a Hub dataset; repeatable.",
)  # fmt: skip
@click.option("--text-field", default="text", show_default=True, help="Field of JSON lines, parquet and datasets.")
@click.option("--eval-data", multiple=True, metavar="SOURCE", help="Held-out text. Default: a share of the documents.")
@click.option("--eval-fraction", type=float, default=0.02, show_default=True, help="Share of documents held out.")
@click.option("--tokenizer", metavar="NAME", help="Folder or Hub id. Default: bytes as tokens.")
@click.option("--out", required=True, type=click.Path(file_okay=False), metavar="DIR", help="Folder of the result.")
@click.option("--context", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens in a sequence.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences in a batch.")
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Batches in a step.")
@click.option("--tokens", type=COUNT, metavar="N", help="Training tokens in all, such as 10M. Default: the text once.")
@click.option("--steps", type=COUNT, metavar="N", help="Optimiser steps, in place of --tokens.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="Peak, after the warm-up.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), default="float32", show_default=True,
    help="Data type of training (autocast) and of the saved weights.",
)  # fmt: skip
@click.option("--restart", is_flag=True, help="Discard what an earlier run left in DIR.")
@energy_option
@click.option("--evaluate/--no-evaluate", default=True, show_default=True, help="Measure the result at the end.")
@output_options
def command(output: Output, data: tuple[str, ...], eval_data: tuple[str, ...], out: str, **options: Any) -> None:
    """Train an architecture from scratch on text, through transformers' Trainer.

    You can stop it at any time: the same command resumes and ends at the same weights. On several devices:
    `torchrun --nproc-per-node N -m rnnzoo train ...`.
    """
    with output.only_result_on_stdout(), ProgressReport(quiet=output.quiet) as progress:
        from ..conversions.memory import keep_freed_memory
        from ..conversions.processes import Processes
        from ..conversions.train import TrainSettings, train
        from ..conversions.train_config import parse_settings

        keep_freed_memory()
        fields = parse_settings(options.pop("settings"))
        for option, field in (("hidden_size", "hidden_size"), ("layers", "num_hidden_layers")):
            value = options.pop(option)
            fields |= {} if value is None else {field: value}
        names = ("arch", "config", "size", "text_field", "tokenizer", "restart", "evaluate", "energy")
        chosen = {name: options.pop(name) for name in names}
        results = train(
            out,
            list(data),
            **chosen,
            fields=fields,
            eval_data=list(eval_data) or None,
            settings=TrainSettings(**options),
            progress=progress,
        )
        Processes().end()
    from .results import show_results

    if results:  # under torchrun only the first process has them
        output.result(results, lambda console: show_results(results, out, console))
