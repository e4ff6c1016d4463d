"""Changes of Python source that keep its comments: parts of the text, found in the syntax tree, are replaced."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Edit", "apply", "docstring_of", "lines_of", "replacing", "span_of"]


@dataclass(frozen=True)
class Edit:
    """Characters `start` to `stop` of a text become `text`."""

    start: int
    stop: int
    text: str


def apply(text: str, edits: Iterable[Edit]) -> str:
    """The text after all edits; one that lies inside another is overruled by it."""
    done, stop = [], 0
    for edit in sorted(set(edits), key=lambda e: (e.start, -e.stop)):
        if edit.start >= stop:
            done += [text[stop : edit.start], edit.text]
            stop = edit.stop
    return "".join([*done, text[stop:]])


class Offsets:
    """Where the lines of a text begin, in characters; the tree counts columns in bytes."""

    def __init__(self, text: str):
        self.lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        content = self.lines[line - 1].encode()[:column].decode()
        return self.starts[line - 1] + len(content)


def span_of(node: Any, offsets: Offsets) -> tuple[int, int]:
    """First character and the one after the last of an expression or statement, without its decorators."""
    return offsets.at(node.lineno, node.col_offset), offsets.at(node.end_lineno, node.end_col_offset)


def replacing(node: Any, text: str, offsets: Offsets) -> Edit:
    return Edit(*span_of(node, offsets), text)


def lines_of(statement: Any, offsets: Offsets) -> tuple[int, int]:
    """The whole lines of a statement, with its decorators and the comments directly above."""
    decorators = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(d.lineno for d in decorators)]) - 1
    while first and offsets.lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return offsets.starts[first], offsets.starts[statement.end_lineno]


def docstring_of(node: ast.AST) -> Any:
    """The docstring's statement of a module, class or function; None where it has none."""
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return first if is_text else None
