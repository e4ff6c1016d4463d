"""Options that several commands share: those of one conversion, and of loading a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .quantities import BYTES, COUNT, COUNT_OR_NONE

__all__ = ["conversion_options", "energy_option", "loading_options", "trust_option"]

_OPTIONS = [
    click.argument("teacher", required=False),
    click.option(
        "--recipe", default="rnnzoo", show_default=True, help="Name (see `rnnzoo list`) or path of a YAML file."
    ),
    click.option(
        "--student", metavar="ARCH", help="Mixer of the converted layers (see `rnnzoo list`). Default: the recipe's."
    ),
    click.option(
        "--keep",
        metavar="LAYERS",
        help="Layers that stay attention: `none`, a share such as 1/4, numbers (0,8,16), or `first`, `last` or `best` "
        "with a number or a share, such as 'best 25%'. Default: the recipe's.",
    ),
    click.option(
        "--ranking",
        metavar="FILE",
        help="Layer ranking for `--keep best`, from `rnnzoo plan --select`. Default: made by the conversion.",
    ),
    click.option(
        "--state-budget",
        type=BYTES,
        metavar="SIZE",
        help="Total bytes of recurrent state, such as 4MB. Default: the recipe's.",
    ),
    click.option(
        "--tokens",
        type=COUNT_OR_NONE,
        metavar="N",
        help="Total training tokens, such as 500k; 0: closed-form fits only. Default: the recipe's.",
    ),
    click.option(
        "--seq-len",
        type=click.IntRange(min=8),
        metavar="N",
        help="Tokens in a training sequence. Default: the recipe's.",
    ),
    click.option("--batch-tokens", type=COUNT, metavar="N", help="Tokens of an optimiser step. Default: the recipe's."),
    click.option(
        "--chat-data",
        multiple=True,
        metavar="SOURCE",
        help="Chats or preference pairs, for recipes with stages of kind sft or dpo; repeatable.",
    ),
    click.option("--revision", help="Branch, tag or commit, where TEACHER is a Hub id."),
]


def conversion_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add TEACHER and the options that `plan` and `convert` share."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Execute Python code that comes with the model. Without this, none is executed.",
)


energy_option = click.option(
    "--energy",
    metavar="COUNTRY",
    help="Measure energy and CO2 with CodeCarbon (extra `energy`); give the country's ISO code, such as DEU.",
)


def loading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --dtype, --revision and --trust-remote-code, for a model in DIR."""
    types = click.Choice(["auto", "float32", "bfloat16", "float16"])
    function = click.option("--revision", help="Branch, tag or commit, where DIR is a Hub id.")(trust_option(function))
    return click.option("--dtype", type=types, default="auto", show_default=True)(function)
