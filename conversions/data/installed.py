"""English prose that every Python installation holds: language reference, docstrings, package descriptions, licences.

Most of that is code, tables and signatures. A paragraph is kept only if it reads like prose: sentences of words, with
the small words that hold English together, and no markup or symbols of code to speak of.
"""

from __future__ import annotations

import functools
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PROSE_SOURCE", "python_prose"]

PROSE_SOURCE = "prose of the Python installation: documentation, docstrings, package descriptions and licences"

_SMALL = """
    a about after all also an and any are as at be because been before but by can could did do does each for
    from had has have he her his how i if in into is it its may more most must no not of on one only or other
    our out over own same should so some such than that the their them then there these they this those to under
    up use used was we were what when where which while who will with would you your"""
SMALL_WORDS = frozenset(_SMALL.split())
LEAST_WORDS, MOST_DIGITS_AND_SYMBOLS, LEAST_SMALL_WORDS = 25, 0.06, 0.30
LEAST_DOCUMENT = 600  # characters
DOCSTRING = re.compile(r'"""(.{200,}?)"""', re.DOTALL)
CODE_SIGNS = re.compile(
    r">>>|---|[{}<>=|\\_\[\]@#$^~]|\w\.\w+\(|\(\)|^\s*[:*+.-]{1,2}\s?\w|\.\.\s|https?:|\w/\w+/\w", re.MULTILINE
)
HEADED = re.compile(
    r"(Arg|Argument|Attribute|Return|Raise|Param|Parameter|Yield|Example|Shape|Input|Output)s?\s*(:|-{3})|See [Aa]lso"
)
ROLE = re.compile(r":[\w:+-]+:`~?\.?([^`<]+)(?: <[^`]*>)?`")
LINK = re.compile(r"`([^`<]+?)\s*<[^`]*>`_*|!?\[([^\]]+)\]\([^)]*\)")
MARKS = re.compile(r"``|`|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)")


@functools.cache
def python_prose() -> tuple[str, ...]:
    """Documents of one or more paragraphs, each paragraph on one line, none twice, in the order of their files.

    How much depends on what is installed: some hundred thousand words, found in about ten seconds.
    """
    seen: set[str] = set()
    documents: list[str] = []
    for file in _files():
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # one unreadable file among thousands does not matter
            continue
        documents += _documents(_texts(file, content), seen)
    return tuple(documents)


def _files() -> list[Path]:
    """Sources and texts of the standard library and of installed packages, sorted."""
    paths = sysconfig.get_paths()
    roots = {Path(paths[name]) for name in ("stdlib", "purelib", "platlib")}
    found = set()
    for root in roots:
        for pattern in ("**/*.py", "**/*.md", "**/*.rst", "**/*.txt", "**/METADATA", "**/LICENSE*"):
            found.update(path for path in root.glob(pattern) if path.is_file() and not _is_test(path))
    return sorted(found)


def _is_test(path: Path) -> bool:
    return any(part in ("test", "tests", "testing", "idlelib", "lib2to3") for part in path.parts)


def _texts(file: Path, content: str) -> list[str]:
    if file.suffix != ".py":
        return [content]
    if file.name == "topics.py" and file.parent.name == "pydoc_data":
        from pydoc_data import topics  # the language reference, as the help command shows it

        return list(topics.topics.values())
    return [inspect.cleandoc(text) for text in DOCSTRING.findall(content)]


def _documents(texts: list[str], seen: set[str]) -> Iterator[str]:
    """The prose of a file as one document: its docstrings speak of one matter."""
    kept = []
    for text in texts:
        for raw in re.split(r"\n\s*\n", text):
            paragraph = _clean(raw)
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
    document = "\n\n".join(kept)
    if len(document) >= LEAST_DOCUMENT:
        yield document


def _clean(raw: str) -> str:
    """One paragraph without markup on one line, or "" where it is not prose."""
    text = LINK.sub(lambda m: m.group(1) or m.group(2), ROLE.sub(r"\1", raw))
    text = " ".join(MARKS.sub("", text).split())
    if not text or not text[0].isupper() or text[-1] not in '.!?")':
        return ""
    if CODE_SIGNS.search(text) or HEADED.match(text) or text.isupper():
        return ""
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < LEAST_WORDS:
        return ""
    odd = sum(not (c.isalpha() or c in " .,;:'\"()!?-") for c in text) / len(text)
    small = sum(word.lower() in SMALL_WORDS for word in words) / len(words)
    return text if odd <= MOST_DIGITS_AND_SYMBOLS and small >= LEAST_SMALL_WORDS else ""
