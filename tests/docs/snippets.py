"""Blocks of code in Markdown, and how they are run.

Blocks of `python`, `bash` and `yaml` are snippets; blocks of `text` are output or equations. A page's python blocks
share a namespace and all of its blocks a folder, in the order of the page. A comment above one says what is special:

    <!-- snippet: not run, REASON -->    a person has to; there are few
    <!-- snippet: slow -->               minutes: with `-m slow` only
    <!-- snippet: options --tokens 6k --> added to every `rnnzoo` command, so that it takes seconds
    <!-- snippet: replace 20M 2k -->     likewise, a word of it
    <!-- snippet: file mine.yaml -->     the block is a file, for what comes after

Several are separated by `;`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rnnzoo import cli

__all__ = ["LANGUAGES", "Snippet", "run", "snippets"]

LANGUAGES = ("python", "bash", "yaml")
OTHER = ("text",)
FENCE = re.compile(
    r"^(?:<!-- snippet: (?P<marks>.+?) -->\n)?(?P<fence>```)(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```\s*?$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """One block.

    Attributes:
        where: page and line. not_run: the reason, "" where it is run.
    """

    where: str
    language: str
    body: str
    not_run: str = ""
    slow: bool = False
    options: tuple[str, ...] = ()
    replaced: dict[str, str] = field(default_factory=dict)
    file: str = ""


def snippets(markdown: str, page: str) -> list[Snippet]:
    """The snippets of a page.

    Raises:
        ValueError: a block in an unknown language, or an unknown mark.
    """
    found = []
    for block in FENCE.finditer(markdown):
        where = f"{page}:{markdown[: block.start('fence')].count(chr(10)) + 1}"
        if block["language"] in OTHER:
            continue
        if block["language"] not in LANGUAGES:
            raise ValueError(f"{where}: a block of {block['language']!r}; expected one of {(*LANGUAGES, *OTHER)}.")
        found.append(Snippet(where, block["language"], block["body"], **_marks(block["marks"] or "", where)))
    return found


def _marks(text: str, where: str) -> dict[str, Any]:
    marks: dict[str, Any] = {}
    for mark in filter(None, map(str.strip, text.split(";"))):
        kind, _, rest = mark.partition(" ")
        if mark.startswith("not run, "):
            marks["not_run"] = mark.removeprefix("not run, ")
        elif mark == "slow":
            marks["slow"] = True
        elif kind == "options" and rest:
            marks["options"] = tuple(shlex.split(rest))
        elif kind == "replace" and len(rest.split()) == 2:
            marks.setdefault("replaced", {}).update([rest.split()])
        elif kind == "file" and rest:
            marks["file"] = rest
        else:
            raise ValueError(f"{where}: {mark!r} is no mark of a snippet.")
    return marks


def run(snippet: Snippet, namespace: dict[str, Any]) -> None:
    """Runs one in the current folder; whatever goes wrong is raised with its place."""
    if snippet.file:
        Path(snippet.file).write_text(snippet.body)
    if snippet.language == "yaml":
        yaml.safe_load(snippet.body)
    elif snippet.language == "python":
        exec(compile(snippet.body, snippet.where, "exec"), namespace)
    elif all(line.startswith("rnnzoo ") for line in _lines(snippet)):
        for line in _lines(snippet):
            _rnnzoo(snippet, line)
    else:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", snippet.body], capture_output=True, text=True)
        assert done.returncode == 0, f"{snippet.where}: {done.stderr}"


def _lines(snippet: Snippet) -> list[str]:
    joined = snippet.body.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def _rnnzoo(snippet: Snippet, line: str) -> None:
    """In this process, which has torch loaded already; it is the function behind the console script."""
    words = [snippet.replaced.get(word, word) for word in shlex.split(line, comments=True)]
    code = cli._run([*words[1:], *snippet.options])
    sys.stdout.flush()
    assert code == 0, f"{snippet.where}: {line} ended with {code} in {os.getcwd()}; its error is on stderr"
