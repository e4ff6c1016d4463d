"""The evaluation part of results.json as tables on a terminal: those of the card."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...cards.view import View

__all__ = ["show", "tables"]


def tables(results: dict[str, Any]) -> list[Table]:
    """One table for quality, then position, recall and decoding, as far as they were measured."""
    view = View(results)
    chance, back = f"chance {view.chance:.2f}", "tokens back"
    found = (
        ("Quality", ["measure", "n", *view.heads, *view.ratio_head], view.comparison()),
        ("Perplexity by position", ["tokens", *view.heads], view.positions()),
        (f"Recall ({chance})", [back, "n", *view.heads], view.recall()),
        (f"Recall late in a text ({chance})", ["tokens before", back, "n", *view.heads], view.late_recall()),
        ("Branches alone", ["branch", "perplexity", f"recall by {back}"], view.ablations()),
        ("Decoding, tokens/s", ["context", *view.heads, *view.ratio_head], view.speeds()),
        ("State", ["context", *view.heads], view.states()),
    )
    return [_table(*table) for table in found if table[-1]]


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables."""
    for table in tables(results):
        (console or Console()).print(table)


def _table(title: str, heads: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
