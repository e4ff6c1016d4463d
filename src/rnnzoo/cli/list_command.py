"""`rnnzoo list`: architectures and their sizes, recipes, and the kernels of this machine."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import click

from .kernel_backends import kernel_backends
from .output import Output, output_options
from .quantities import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 768  # hidden_size at which the state of a layer is given


@click.command("list")
@click.option("--sizes", is_flag=True, help="The published sizes of every architecture: parameters and state bytes.")
@output_options
def command(sizes: bool, output: Output) -> None:
    """List architectures, recipes, and the kernels with their backends on this machine.

    State: bytes of one layer for one sequence, at hidden_size 768 in bfloat16. Time: of a forward pass over T tokens;
    memory: of a layer while decoding. From attention: `rnnzoo convert` can make it of a Transformer.
    """
    from ..zoo.core.registry import architectures

    if sizes:
        published = {name: published_sizes(name) for name in architectures()}
        output.result(published, lambda console: _show_sizes(published, console))
        return
    from ..conversions.recipes import list_recipes

    value = {
        "architectures": {name: facts(name) for name in architectures()},
        "recipes": dict(list_recipes()),
        "kernels": {
            kernel: [backend["backend"] for backend in backends if backend["available"]]
            for kernel, backends in kernel_backends().items()
        },
    }
    output.result(value, lambda console: _show(value, console))


def facts(architecture: str) -> dict[str, Any]:
    """What an architecture is and what it can be made from."""
    import torch

    from ..zoo.core.importing import formats, importable
    from ..zoo.core.registry import mixer_class
    from ..zoo.core.sizes import architecture_config, causal_lm_class, state_bytes

    config_class = architecture_config(architecture)
    mixer = mixer_class(config_class.mixer)
    config = config_class(vocab_size=1, hidden_size=WIDTH, num_hidden_layers=1)
    return {
        "summary": summary(causal_lm_class(architecture)),
        "paper": mixer.paper,
        "kernel": mixer.kernel,
        "complexity": mixer.complexity,
        "state_bytes": state_bytes(config, torch.bfloat16),
        "from_attention": mixer.starts_from_attention(),
        "imports": list(formats(architecture)) if architecture in importable() else [],
    }


def summary(model: type) -> str:
    """The first sentence of the docstring at the head of the file that defines a model."""
    doc = inspect.cleandoc(sys.modules[model.__module__].__doc__ or "").split("\n\n")[0]
    return " ".join(doc.split()).split(". ")[0].rstrip(".")


def published_sizes(architecture: str) -> dict[str, dict[str, int]]:
    """Layers, width, parameters, and state bytes of one sequence in bfloat16, of each published size.

    `growing_layers` are those whose state grows with the text and is not counted.
    """
    import torch

    from ..zoo.core.registry import mixer_class
    from ..zoo.core.sizes import architecture_config, parameter_count, state_bytes, window_bytes

    cls = architecture_config(architecture)
    found = {}
    for size, fields in cls.sizes.items():
        config = cls(**fields)
        found[size] = {
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "parameters": parameter_count(config),
            "state_bytes": state_bytes(config, torch.bfloat16) + window_bytes(config, torch.bfloat16),
            "growing_layers": sum(
                not mixer_class(kind).complexity.endswith("/ 1") for kind in config.layer_types or ()
            ),
        }
    return found


def _show(value: dict[str, Any], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    _show_architectures(value["architectures"], console)
    for title in ("recipes", "kernels"):
        table = Table(title=title.capitalize(), title_justify="left", show_header=False, box=None, pad_edge=False)
        for name, description in value[title].items():
            words = description if isinstance(description, str) else ", ".join(description)
            table.add_row(Text(name, style="bold"), Text(words))
        console.print()
        console.print(table)


def _show_architectures(architectures: dict[str, dict[str, Any]], console: Console) -> None:
    """One line of facts for each, its first sentence below: too much for the columns of one table."""
    from rich.padding import Padding
    from rich.text import Text

    head = ("Architecture", "state", "time / memory", "kernel")
    rows = [
        (name, state_words(entry), entry["complexity"], entry["kernel"] or "-") for name, entry in architectures.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(name: str, state: str, complexity: str, kernel: str) -> Text:
        facts = f"  {state.rjust(widths[1])}  {complexity.ljust(widths[2])}  {kernel}"
        return Text.assemble((name.ljust(widths[0]), "bold"), facts)

    console.print(line(*head))
    for row, entry in zip(rows, architectures.values(), strict=True):
        console.print(line(*row))
        said = f"{entry['summary']}. {entry['paper']}."
        sources = ["from attention"] if entry["from_attention"] else []
        sources += [f"imports {', '.join(entry['imports'])}"] if entry["imports"] else []
        said += f" ({'; '.join(sources)})" if sources else ""
        console.print(Padding(Text(said, style="dim"), (0, 0, 0, 4)))


def state_words(entry: dict[str, Any]) -> str:
    """Bytes of an architecture's `facts`, or that they grow with the text."""
    return format_bytes(entry["state_bytes"]) if entry["complexity"].endswith("/ 1") else "grows"


def size_cells(entry: dict[str, int]) -> list[str]:
    """layers, width, vocabulary, parameters and state of one of `published_sizes`."""
    state = "grows" if entry["growing_layers"] else format_bytes(entry["state_bytes"])
    numbers = [f"{entry[key]:,}" for key in ("layers", "hidden_size", "vocab_size")]
    return [*numbers, format_count(entry["parameters"]), state]


def _show_sizes(published: dict[str, dict[str, dict[str, int]]], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("Architecture", "size"):
        table.add_column(title)
    for title in ("layers", "width", "vocabulary", "parameters", "state"):
        table.add_column(title, justify="right")
    for name, sizes in published.items():
        for size, entry in sizes.items():
            table.add_row(Text(name, style="bold"), Text(size), *size_cells(entry))
            name = ""
    console.print(table)
    if without := [name for name, sizes in published.items() if not sizes]:
        console.print(Text(f"No published sizes: {', '.join(without)}.", style="dim"))
