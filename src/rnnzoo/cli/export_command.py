"""`rnnzoo export DIR --to FORMAT`: a model of the zoo as another implementation's checkpoint."""

from __future__ import annotations

import click

from .output import Output, output_options


@click.command("export")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@click.option("--to", "format", metavar="FORMAT", required=True, help="For example transformers, fla or rwkv.")
@click.option("--out", metavar="OUT", type=click.Path(file_okay=False), required=True, help="New folder.")
@output_options
def command(folder: str, format: str, out: str, output: Output) -> None:
    """Write the model in DIR as a checkpoint that another implementation loads."""
    from ..zoo.core.importing import export_checkpoint

    path = export_checkpoint(folder, format, out)
    output.result({"checkpoint": str(path)}, lambda console: console.print(str(path), markup=False, soft_wrap=True))
