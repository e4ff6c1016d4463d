"""From docstrings, as the sources have them, to Markdown."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable

__all__ = ["Entry", "arguments", "escape", "first_sentence", "prose", "table"]


def escape(text: str) -> str:
    """`text` with what Markdown would take for markup made plain; code in backticks stays as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts
    )


def prose(docstring: str) -> str:
    """Paragraphs as paragraphs, indented blocks (equations) as blocks of code."""
    blocks, code = [], []
    for line in [*inspect.cleandoc(docstring).splitlines(), "end"]:
        if line.startswith("    ") or (code and not line.strip()):
            code.append(line)
            continue
        if code:
            blocks.append(_fenced(code))
            code = []
        blocks.append(escape(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(blocks[:-1])).strip() + "\n"


def _fenced(lines: list[str]) -> str:
    body = inspect.cleandoc("\n" + "\n".join(lines)).strip("\n")
    return f"\n```text\n{body}\n```\n"


def first_sentence(docstring: str) -> str:
    """Up to the first full stop that ends a sentence."""
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of an `Args:` section: the names that it explains, in order, and its text.

    Several names may share an entry: `a, b: text.`, `a and b: text.`, or `a: text. b: text.`, where the text goes on to
    say `b: text.`; an entry is kept whole, because its later parts refer to its earlier ones.
    """

    names: tuple[str, ...]
    text: str


def arguments(docstring: str, names: Iterable[str]) -> list[Entry]:
    """The entries of the `Args:` or `Attributes:` section that explain any of `names`."""
    section = re.search(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n?|\n)*)", inspect.cleandoc(docstring), re.MULTILINE)
    lines = inspect.cleandoc("\n" + section.group(1)).splitlines() if section else []
    entries: list[list[str]] = []
    for line in lines:
        if line.startswith(" ") and entries:
            entries[-1].append(line.strip())
        elif line.strip():
            entries.append([line.strip()])
    return [entry for words in entries if (entry := _entry(" ".join(words), set(names))).names]


def _entry(text: str, known: set[str]) -> Entry:
    heads = re.finditer(r"(?:^|(?<=[.;] ))(\w+(?:(?:, and|,| and) \w+)*): ", text)
    own = [name for head in heads for name in re.findall(r"\w+", head[1]) if name in known]
    # What stands before the first colon is the first column already.
    return Entry(tuple(dict.fromkeys(own)), text.partition(": ")[2])


def table(head: list[str], rows: Iterable[Iterable[str]], align: str = "") -> str:
    """A Markdown table; `align` has a letter a column, l or r."""
    marks = ["---:" if letter == "r" else "---" for letter in align.ljust(len(head), "l")]
    lines = [head, marks, *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines) + "\n"
