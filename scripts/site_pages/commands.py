"""The command line, from the click commands themselves."""

from __future__ import annotations

import inspect
import re

import click

from rnnzoo.cli import COMMANDS, rnnzoo

from .text import escape, table

__all__ = ["sections"]


def sections() -> str:
    """A section for every command: usage, what it does, arguments and options."""
    with click.Context(rnnzoo, info_name="rnnzoo", **rnnzoo.context_settings) as root:
        return "\n\n".join(_section(root, name, "##") for name in COMMANDS) + "\n"


def _section(parent: click.Context, name: str, mark: str) -> str:
    assert isinstance(parent.command, click.Group)
    command = parent.command.get_command(parent, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=parent)
    usage = command.get_usage(context).removeprefix("Usage: ")
    parts = [f"{mark} {context.command_path}", f"```text\n{usage}\n```", _help(command.help or "")]
    inner = command.list_commands(context) if isinstance(command, click.Group) else []
    return "\n\n".join([*parts, _options(command, context), *(_section(context, one, f"{mark}#") for one in inner)])


def _help(text: str) -> str:
    """click's markers of paragraphs that it must not wrap are taken out."""
    return escape(inspect.cleandoc(re.sub(r"[\b\f]", "", text)))


def _options(command: click.Command, context: click.Context) -> str:
    """Arguments stand in the usage, and the text above explains them."""
    records = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
    return table(["option", ""], [[f"`{names}`", escape(said)] for names, said in records if said])
