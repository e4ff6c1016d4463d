"""A click group whose commands are modules, imported when they are called or asked for help."""

from __future__ import annotations

import importlib
from typing import Any

import click


class LazyGroup(click.Group):
    """Commands `name` live in `{package}.{name}_command` as the attribute `command`.

    Args:
        commands_help: name -> the line that the group's help shows, so that it imports no command.
        package: dotted name of the package with the command modules.
    """

    def __init__(self, *args: Any, commands_help: dict[str, str], package: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands_help = commands_help
        self.package = package

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_help)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_help:
            return None
        return importlib.import_module(f"{self.package}.{cmd_name}_command").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.commands_help.items()))
