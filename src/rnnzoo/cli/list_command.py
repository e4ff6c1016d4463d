"""`rnnzoo list`: architectures, recipes, and the kernels of this machine."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import click

from .kernel_backends import kernel_backends
from .output import Output, output_options

if TYPE_CHECKING:
    from rich.console import Console


@click.command("list")
@output_options
def command(output: Output) -> None:
    """List architectures, recipes, and the kernels with their backends on this machine."""
    from ..conversions.recipes import list_recipes
    from ..zoo.core.registry import architectures, mixer_class

    value = {
        "architectures": {name: summary(mixer_class(name)) for name in architectures()},
        "recipes": dict(list_recipes()),
        "kernels": {
            kernel: [backend["backend"] for backend in backends if backend["available"]]
            for kernel, backends in kernel_backends().items()
        },
    }
    output.result(value, lambda console: _show(value, console))


def summary(mixer: type) -> str:
    """The first sentence of the docstring at the head of the file that defines a mixer."""
    doc = inspect.cleandoc(sys.modules[mixer.__module__].__doc__ or "").split("\n\n")[0]
    return " ".join(doc.split()).split(". ")[0].rstrip(".")


def _show(value: dict[str, Any], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    for title, rows in value.items():
        table = Table(title=title.capitalize(), title_justify="left", show_header=False, box=None, pad_edge=False)
        for name, description in rows.items():
            words = description if isinstance(description, str) else ", ".join(description)
            table.add_row(Text(name, style="bold"), Text(words))
        console.print(table)
        console.print()
