"""`rnnzoo card DIR`: the model card, from results.json alone."""

from __future__ import annotations

import click

from .output import Output, output_options


@click.command("card")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@output_options
def command(folder: str, output: Output) -> None:
    """Write README.md in DIR from its results.json; what was not measured is said so."""
    from ..cards.render import render_card

    path = render_card(folder)
    output.result({"card": str(path)}, lambda console: console.print(str(path), markup=False, soft_wrap=True))
