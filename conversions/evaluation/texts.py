"""Evaluation data: what a file holds is told by its fields.

| kind | content | measure |
|---|---|---|
| text | plain text, or JSON lines with `text` | perplexity (documents joined by a blank line) |
| long | a text of which one document is long enough (a book) | perplexity by position as well |
| last_word | JSON lines with `context` and `target` | last word (LAMBADA) |
| pairs | JSON lines with `sentence_good` and `sentence_bad` | minimal pairs (BLiMP) |
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...kernels.errors import RnnzooError

__all__ = ["Dataset", "load", "load_all"]

_LONG = 100_000  # characters of one document, about 20k tokens, from which it serves as a long text


@dataclass(frozen=True)
class Dataset:
    """One evaluation set. `items` are dicts for tasks; `documents` are the texts of the text kinds."""

    name: str
    kind: str
    documents: tuple[str, ...] = ()
    items: tuple[dict[str, Any], ...] = ()

    @cached_property
    def sha256(self) -> str:
        items = (json.dumps(item, sort_keys=True, ensure_ascii=False) for item in self.items)
        return hashlib.sha256(b"".join(text.encode() + b"\0" for text in (*self.documents, *items))).hexdigest()

    @property
    def text(self) -> str:
        return "\n\n".join(self.documents)

    @classmethod
    def of_texts(cls, name: str, texts: Iterable[str]) -> Dataset:
        """Held-out documents that the caller already has in memory."""
        documents = tuple(texts)
        longest = max((len(document) for document in documents), default=0)
        if not longest:
            raise RnnzooError(f"The evaluation text {name} is empty: give it at least one document.")
        return cls(name, "long" if len(documents) > 1 and longest >= _LONG else "text", documents)


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except FileNotFoundError:
        raise RnnzooError(f"Evaluation file {path} does not exist.") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RnnzooError(
            f"Evaluation file {path} is not readable text ({error}): give UTF-8 text, plain or .gz."
        ) from None
    if not text.strip():
        raise RnnzooError(f"Evaluation file {path} is empty.")
    return text


def _name(path: Path) -> str:
    """wikitext2_raw/test.txt.gz -> wikitext2_raw/test; a file that says enough by itself keeps its own name."""
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    return f"{path.parent.name}/{stem}" if stem in ("test", "valid", "validation", "train", "data") else stem


def load(path: str | Path) -> Dataset:
    """Reads one evaluation file: .txt, .md, .jsonl or .json, each also as .gz.

    Raises:
        RnnzooError: missing, empty or binary file; JSON lines with fields that no measure knows.
    """
    path = Path(path)
    text, name = _read(path), _name(path)
    if Path(path.name.removesuffix(".gz")).suffix not in (".jsonl", ".json"):
        return Dataset.of_texts(name, [text])
    try:
        items = tuple(json.loads(line) for line in text.splitlines() if line.strip())
    except json.JSONDecodeError as error:
        raise RnnzooError(
            f"Evaluation file {path} is not JSON lines ({error}): one object a line is expected."
        ) from None
    fields = set(items[0]) if isinstance(items[0], dict) else set()
    if {"context", "target"} <= fields:
        return Dataset(name, "last_word", items=items)
    if {"sentence_good", "sentence_bad"} <= fields:
        return Dataset(name, "pairs", items=items)
    if "text" in fields:
        return Dataset.of_texts(name, [item["text"] for item in items])
    raise RnnzooError(
        f"Evaluation file {path} has the fields {sorted(fields)}: expected text, or context and target, or "
        "sentence_good and sentence_bad."
    )


def load_all(datasets: Iterable[str | Path | Dataset]) -> list[Dataset]:
    """Files, folders (every text or JSON-lines file in them, sorted) and ready datasets, as datasets."""
    loaded: list[Dataset] = []
    for entry in datasets:
        if isinstance(entry, Dataset):
            loaded.append(entry)
        elif Path(entry).is_dir():
            files = [
                p for p in sorted(Path(entry).rglob("*")) if p.name.endswith((".txt", ".txt.gz", ".jsonl", ".jsonl.gz"))
            ]
            if not files:
                raise RnnzooError(f"Evaluation folder {entry} holds no .txt or .jsonl file, plain or .gz.")
            loaded.extend(load(path) for path in files)
        else:
            loaded.append(load(entry))
    return loaded
