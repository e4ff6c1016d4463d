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
        return "\n\n".join(_section(root, name) for name in COMMANDS) + "\n"


def _section(root: click.Context, name: str) -> str:
    command = rnnzoo.get_command(root, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=root)
    parts = [f"## rnnzoo {name}", f"```text\n{_usage(command, context)}\n```", _help(command.help or "")]
    parts.append(_options(command, context))
    if isinstance(command, click.Group):
        for inner_name in command.list_commands(context):
            inner = command.get_command(context, inner_name)
            assert inner is not None
            inner_context = click.Context(inner, info_name=inner_name, parent=context)
            parts += [f"### rnnzoo {name} {inner_name}", f"```text\n{_usage(inner, inner_context)}\n```"]
            parts += [_help(inner.help or ""), _options(inner, inner_context)]
    return "\n\n".join(parts)


def _usage(command: click.Command, context: click.Context) -> str:
    return command.get_usage(context).removeprefix("Usage: ")


def _help(text: str) -> str:
    """click's markers of paragraphs that it must not wrap are taken out."""
    return escape(inspect.cleandoc(re.sub(r"[\b\f]", "", text)))


def _options(command: click.Command, context: click.Context) -> str:
    """Arguments stand in the usage, and the text above explains them."""
    records = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
    return table(["option", ""], [[f"`{names}`", escape(said)] for names, said in records if said])
