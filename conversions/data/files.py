"""Documents in files: plain text, JSON lines, JSON and parquet, compressed or not.

A reader yields one string a document and never holds more than one piece of a file (JSON arrays excepted). Anything
that is not what its name says raises `RnnzooError` with the file, the place and the remedy.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...kernels.errors import RnnzooError
from ..teachers.files import user_errors

__all__ = ["SUFFIXES", "data_files", "is_plain_text", "read_file"]

SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".json", ".parquet")
# Documents of a text file, in characters: about 8,000 tokens, so that a long context still fits; less where a small
# file would not make a hundred of them, so that it can still be split.
PIECE_CHARACTERS, LEAST_PIECE_CHARACTERS, PIECES = 32_000, 4_000, 100
LONGEST_LINE = 1 << 26  # bytes; a longer "line" of text is binary data in disguise
WIKI_TITLE = re.compile(r" = [^=].* = \n?")  # WikiText marks the start of an article so

Render = Callable[[dict[str, Any], str], str]


def kind_of(path: Path) -> str:
    """The suffix that tells the format, without .gz; "" where it is none of ours."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def is_plain_text(path: Path) -> bool:
    """Whether a file is read as text, not as records."""
    return kind_of(path) in (".txt", ".text", ".md")


def data_files(path: Path) -> list[Path]:
    """The file itself, or every readable file below a folder in sorted order; hidden ones are left out.

    Raises:
        RnnzooError: an unknown format, or a folder without a single readable file.
    """
    formats = ", ".join(SUFFIXES) + " (text and JSON also .gz)"
    if path.is_file():
        if not kind_of(path):
            raise RnnzooError(f"{path} is of an unknown format; --data takes {formats}, folders and Hub dataset ids.")
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and kind_of(file) and not any(p.startswith(".") for p in file.relative_to(path).parts)
    )
    if not found:
        raise RnnzooError(f"The folder {path} holds no data file; --data takes {formats}.")
    return found


def read_file(path: Path, render: Render) -> Iterator[str]:
    """The documents of one file in their order; empty ones are left out.

    Args:
        render: turns a record and the name of its place ("data.jsonl, line 3") into text, or raises RnnzooError.
    Raises:
        RnnzooError: not text, not JSON, not parquet, cut short, or unreadable.
    """
    kind = kind_of(path)
    with user_errors(f"The data file {path} cannot be read"):
        if kind == ".parquet":
            documents = _parquet(path, render)
        elif kind in (".jsonl", ".ndjson"):
            documents = _json_lines(path, render)
        elif kind == ".json":
            documents = _json(path, render)
        else:
            documents = _text(path)
        try:
            yield from (document for document in documents if document.strip())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise RnnzooError(f"{path} is not a whole gzip file ({error}); make or download it again.") from error


def _lines(path: Path) -> Iterator[str]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if b"\0" in line or len(line) == LONGEST_LINE:
                raise RnnzooError(f"{path} is binary data, not text (line {number}); --data takes UTF-8 text.")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RnnzooError(
                    f"{path} is not UTF-8 text (line {number}: {error.reason}); convert it, for example with iconv."
                ) from error


def _text(path: Path) -> Iterator[str]:
    """A text file in documents of about 8,000 tokens, cut between paragraphs or where a WikiText article begins."""
    most = min(PIECE_CHARACTERS, max(LEAST_PIECE_CHARACTERS, path.stat().st_size // PIECES))
    piece: list[str] = []
    size = 0
    for line in _lines(path):
        full = size > 2 * most or (size > most and not line.strip())
        if piece and (full or WIKI_TITLE.fullmatch(line)):
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    yield "".join(piece)


def _json_lines(path: Path, render: Render) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RnnzooError(
                f"{place} is not JSON ({error}); a JSON lines file has one object on each line."
            ) from error
        yield render(record, place)


def _json(path: Path, render: Render) -> Iterator[str]:
    """A list of objects, an object with one such list in it, or JSON lines under the wrong name."""
    content = "".join(_lines(path))
    try:
        parsed = json.loads(content)
    except ValueError:
        yield from _json_lines(path, render)
        return
    if isinstance(parsed, dict):
        parsed = next((v for v in parsed.values() if isinstance(v, list) and v and isinstance(v[0], dict)), [parsed])
    for number, record in enumerate(parsed if isinstance(parsed, list) else [parsed], 1):
        yield render(record, f"{path}, record {number}")


def _parquet(path: Path, render: Render) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise RnnzooError(f"Reading {path} needs pyarrow: pip install 'rnnzoo[train]'.") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield render(record, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise RnnzooError(f"{path} is not a readable parquet file ({reason}); download it again.") from error
