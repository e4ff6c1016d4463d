"""Where text comes from: `--data` as a stream of documents, in an order that a seed fixes, in disjoint splits.

Several files are read at once, each as often as its size says, through a shuffling buffer; no more is read than the
buffer and the documents that were asked for. A document's split depends on nothing but the hash of its own text (in a
source of under 500 documents: on the rank of that hash), so it is the same in every run.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...kernels.errors import RnnzooError
from ..teachers.files import hub_reachable
from .files import data_files, is_plain_text, read_file

__all__ = ["Corpus", "Split", "corpus_from_texts", "mixed_corpus", "open_corpus", "split_of"]

Split = Literal["calibration", "training", "evaluation"]
Data = str | Path | Sequence[str | Path]

EVALUATION_PERCENT, CALIBRATION_PERCENT = 2, 8
BUFFER_CHARACTERS = 32_000_000  # local files: large enough to mix whole books
HUB_BUFFER_CHARACTERS = 4_000_000  # a download
FILES_AT_ONCE = 16
SMALL_SOURCE = 500


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    Attributes:
        source: what it is, for the record: names of files or the dataset, and the field.
        read: seed -> documents, shuffled.
        evaluation, calibration: percent of the documents in these splits; the rest is for training.
    """

    source: str
    read: Callable[[int], Iterator[str]]
    evaluation: float = EVALUATION_PERCENT
    calibration: float = CALIBRATION_PERCENT

    def documents(self, split: Split | None = None, *, seed: int = 0) -> Iterator[str]:
        """The documents of one split (all of them for None), in the order of the seed.

        Raises:
            RnnzooError: the source turns out to be unreadable, or to hold no text, or too few documents for splits.
        """
        stream = self.read(seed)
        first = list(itertools.islice(stream, SMALL_SOURCE))
        if not first:
            raise RnnzooError(f"{self.source} holds no text; give --data a source that does.")
        if split is None:
            yield from itertools.chain(first, stream)
            return
        names = [name for name in ("calibration", "training", "evaluation") if getattr(self, name, 1) > 0]
        if len(set(first)) < len(names):
            raise RnnzooError(
                f"{self.source} has {len(set(first))} documents; at least {len(names)} are needed to keep "
                f"{', '.join(names[:-1])} and {names[-1]} apart: give more text, or cut it into more records."
            )
        shares = (self.evaluation, self.calibration)
        if len(first) < SMALL_SOURCE:
            chosen = _small_splits(first, *shares)
            yield from (document for document in first if chosen[document] == split)
        else:
            yield from (document for document in itertools.chain(first, stream) if split_of(document, *shares) == split)

    def beginning(self, split: Split | None, characters: int) -> list[str]:
        """The first documents of a split, each cut to `characters`, until these are that many."""
        texts, size = [], 0
        for text in self.documents(split):
            texts.append(text[:characters])
            size += len(text)
            if size >= characters:
                break
        return texts


def split_of(document: str, evaluation: float = EVALUATION_PERCENT, calibration: float = CALIBRATION_PERCENT) -> Split:
    """The split of a document, by the hash of its text; so many percent are for evaluation and for calibration."""
    number = _hash(document)
    part = number % 100 + number // 100 % 100 / 100  # 0 to 99.99, so that fractions of a percent count too
    if part < evaluation:
        return "evaluation"
    return "calibration" if part < evaluation + calibration else "training"


def _hash(document: str) -> int:
    return int.from_bytes(hashlib.blake2b(document.strip().encode(), digest_size=8).digest(), "big")


def _small_splits(documents: list[str], evaluation: float, calibration: float) -> dict[str, Split]:
    """The splits of a source with few documents: by rank instead of by chance, so that with three none is empty."""
    ranked = sorted(set(documents), key=_hash)
    evaluation, calibration = (math.ceil(len(ranked) * share / 100) for share in (evaluation, calibration))
    splits: dict[str, Split] = dict.fromkeys(ranked, "training")
    splits.update(dict.fromkeys(ranked[: evaluation + calibration], "calibration"))
    splits.update(dict.fromkeys(ranked[:evaluation], "evaluation"))
    return splits


def corpus_from_texts(texts: Iterable[str], source: str) -> Corpus:
    """Documents that are already in memory."""
    kept = [text for text in texts if text.strip()]

    def read(seed: int) -> Iterator[str]:
        order = list(range(len(kept)))
        random.Random(seed).shuffle(order)
        return (kept[i] for i in order)

    return Corpus(source, read)


def mixed_corpus(corpora: Sequence[tuple[Corpus, int]]) -> Corpus:
    """Several sources as one, each drawn from in proportion to its number."""

    def read(seed: int) -> Iterator[str]:
        return _interleaved([(share, functools.partial(corpus.read, seed)) for corpus, share in corpora], seed)

    return Corpus("; ".join(corpus.source for corpus, _ in corpora), read)


def open_corpus(
    data: Data,
    text_field: str = "text",
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    render: Callable[[Any, str], str] | None = None,
) -> Corpus:
    """What `--data` names.

    Args:
        data: one or several of: a text, JSON lines, JSON or parquet file; a folder, read recursively; a Hub dataset as
            "owner/name" or "owner/name:configuration", streamed.
        text_field: the records' field with the text. Records that lack it but have "messages" are chats, rendered with
            the tokenizer's chat template.
        tokenizer: for chats; without one the turns are written as "role: content".
        revision: of a Hub dataset.
        render: instead of text_field and tokenizer: turns a record and the name of its place into the document; files
            of plain text are then refused.
    Raises:
        RnnzooError: not there, an unknown format, an empty file, or a Hub dataset that cannot be reached.
    """
    names = [data] if isinstance(data, str | Path) else list(data)
    records_only = render is not None
    render = render or _renderer(text_field, tokenizer)
    files: list[Path] = []
    streams: list[str] = []
    for name in names:
        path = Path(name).expanduser()
        if path.exists():
            files += data_files(path)
        elif isinstance(name, str) and _looks_like_dataset(name):
            streams.append(name)
        else:
            raise RnnzooError(f"There is no file or folder {name}; --data takes files, folders and Hub dataset ids.")
    if records_only and (plain := [file for file in files if is_plain_text(file)]):
        raise RnnzooError(f"{plain[0]} is plain text; records are needed here: JSON lines, JSON or parquet.")
    files, empty = [f for f in files if f.stat().st_size], [f for f in files if not f.stat().st_size]
    if not files and not streams:
        raise RnnzooError(f"The data file {empty[0]} is empty; give --data a file with text.")
    parts: list[tuple[int, Callable[[], Iterator[str]]]] = [
        (file.stat().st_size, lambda file=file: read_file(file, render)) for file in files
    ]
    opened = [_hub_stream(name, render, revision) for name in streams]
    mean = sum(size for size, _ in parts) // len(parts) if parts else 1
    parts += [(mean, stream) for stream in opened]
    buffer = HUB_BUFFER_CHARACTERS if streams else BUFFER_CHARACTERS
    source = ", ".join(Path(name).name if Path(name).expanduser().exists() else str(name) for name in names)
    return Corpus(source, lambda seed: _shuffled(_interleaved(parts, seed), seed, buffer))


def _interleaved(parts: Sequence[tuple[int, Callable[[], Iterator[str]]]], seed: int) -> Iterator[str]:
    """Documents of all parts, a part drawn in proportion to its size; at most 16 parts are open at a time."""
    draw = random.Random(f"files {seed}")
    waiting = list(parts)
    draw.shuffle(waiting)
    reading: list[tuple[int, Iterator[str]]] = []
    while waiting or reading:
        while waiting and len(reading) < FILES_AT_ONCE:
            size, start = waiting.pop()
            reading.append((size, start()))
        chosen = draw.choices(range(len(reading)), weights=[size for size, _ in reading])[0]
        document = next(reading[chosen][1], None)
        if document is None:
            del reading[chosen]
        else:
            yield document


def _shuffled(stream: Iterator[str], seed: int, characters: int) -> Iterator[str]:
    """A stream in random order, as far as a buffer of so many characters reaches."""
    draw = random.Random(f"order {seed}")
    held: list[str] = []
    size = 0
    for document in stream:
        held.append(document)
        size += len(document)
        while size > characters:
            chosen = draw.randrange(len(held))
            held[chosen], held[-1] = held[-1], held[chosen]
            size -= len(held[-1])
            yield held.pop()
    draw.shuffle(held)
    yield from held


def _renderer(text_field: str, tokenizer: Any) -> Callable[[dict[str, Any], str], str]:
    def render(record: Any, place: str) -> str:
        if not isinstance(record, dict):
            raise RnnzooError(f"{place} is {type(record).__name__}, not an object with a field {text_field!r}.")
        text = record.get(text_field)
        if isinstance(text, str):
            return text
        if isinstance(record.get("messages"), list):
            return _chat(record["messages"], tokenizer, place)
        raise RnnzooError(
            f"{place} has no text in a field {text_field!r}; its fields are {', '.join(map(str, record))}: "
            "choose one with --text-field."
        )

    return render


def _chat(messages: list[dict[str, str]], tokenizer: Any, place: str) -> str:
    try:
        if getattr(tokenizer, "chat_template", None):
            return tokenizer.apply_chat_template(messages, tokenize=False)
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    except Exception as error:  # templates raise whatever they like
        raise RnnzooError(f"{place}: its messages cannot be rendered as a chat ({error}).") from error


def _looks_like_dataset(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(slash and owner and rest) and "/" not in rest and not name.startswith((".", "~"))


def _hub_stream(name: str, render: Callable[..., str], revision: str | None) -> Callable[[], Iterator[str]]:
    try:
        import datasets
    except ImportError as error:
        raise RnnzooError(f"Reading the Hub dataset {name} needs datasets: pip install 'rnnzoo[train]'.") from error
    if not hub_reachable():
        raise RnnzooError(
            f"There is no file or folder {name}, and as a Hub dataset it cannot be reached (no network or "
            "HF_HUB_OFFLINE); give a local file, or leave --data out for the built-in text."
        )
    repository, _, configuration = name.partition(":")
    try:
        stream = datasets.load_dataset(repository, configuration or None, streaming=True, revision=revision)
    except Exception as error:  # datasets, the Hub and the readers each have their own
        raise RnnzooError(f"The Hub dataset {name} cannot be opened: {str(error).splitlines()[0]}") from error
    split = stream["train"] if "train" in stream else next(iter(stream.values()))

    def read() -> Iterator[str]:
        for number, record in enumerate(split, 1):
            yield render(record, f"{name}, row {number}")

    return read
