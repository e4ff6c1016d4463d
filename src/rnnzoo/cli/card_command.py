"""`rnnzoo card DIR`: the model card of any model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .output import Output, output_options


@click.command("card")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@click.option("--licence", "--license", "licence", metavar="NAME", help="Licence of this model, such as apache-2.0.")
@click.option("--language", multiple=True, metavar="CODE", help="Language code. Default: en; repeatable.")
@click.option("--dataset", "datasets", multiple=True, metavar="ID", help="A Hub dataset to link; repeatable.")
@click.option("--collection", "collections", multiple=True, metavar="ID", help="A collection to link; repeatable.")
@click.option("--replace", is_flag=True, help="Replace a README.md that rnnzoo did not write.")
@output_options
def command(folder: str, replace: bool, output: Output, **said: Any) -> None:
    """Write README.md in DIR from its results.json; missing values appear as "not measured".

    A folder without results.json (a fine-tuned model, a PEFT adapter) gets a short card of what its files say. What the
    options say is kept in results.json for the next card. Your own text in the section "Notes" stays.
    """
    from ..cards.describe import said_by_publisher
    from ..cards.render import render_card
    from .facts import model_facts

    path = Path(folder)
    card = render_card(path, replace=replace, said=said_by_publisher(**said), facts=lambda: model_facts(path))
    output.result({"card": str(card)}, lambda console: console.print(str(card), markup=False, soft_wrap=True))
