"""Documents to sequences of one length, with the document boundaries kept.

    row of seq_len tokens:  a a a a b b b c c c c c        input_ids
                            0 0 0 0 1 1 1 2 2 2 2 2        seq_ids: models empty their state where the id changes

A document that does not fit goes on in the next row, as a document of its own there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...kernels.errors import RnnzooError
from ..teachers.files import user_errors
from .hashes import TextHashes

__all__ = ["PackedTokens", "check_sequence_length", "pack"]

log = logging.getLogger(__name__)
ROWS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 100_000  # tokenised in one call
CHARACTERS_PER_TOKEN = 2.5  # below what English needs, so that a document that may be long enough is looked at
LARGEST_SHARE = 16  # one document fills at most a sixteenth, as long as there are others
SEARCH_FACTOR = 64  # long documents are looked for in so many times the characters that were asked for


class PackedTokens(Dataset):
    """N rows of T tokens: `packed[i]` is {"input_ids": (T,), "seq_ids": (T,)}, both int64.

    Those of a file are mapped: a process reads from the disk the rows that it asks for, and no others.

    Attributes:
        input_ids, seq_ids: (N, T), int32.
        source: what the text is, for the record.
        hashes: of the text that was used, for `refuse_overlap`.
    """

    def __init__(self, input_ids: Tensor, seq_ids: Tensor, source: str, hashes: TextHashes):
        self.input_ids, self.seq_ids = input_ids.to(torch.int32), seq_ids.to(torch.int32)
        self.source, self.hashes = source, hashes

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index].long(), "seq_ids": self.seq_ids[index].long()}

    def rows(self, first: int, count: int) -> PackedTokens:
        """`count` rows from `first` on, beginning again where the rows end; of a mapped file they stay mapped."""
        first %= len(self)
        whole = first + count <= len(self)
        part = slice(first, first + count) if whole else torch.arange(first, first + count) % len(self)
        return PackedTokens(self.input_ids[part], self.seq_ids[part], self.source, self.hashes)

    def repeated(self) -> PackedTokens:
        """As many rows, each the first half of one of these, twice, as one document."""
        ids = torch.cat([self.input_ids[:, : self.seq_len // 2]] * 2, 1)
        return PackedTokens(ids, torch.zeros_like(ids), self.source, self.hashes)

    @property
    def seq_len(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def sha256(self) -> str:
        """Of the tokens and their boundaries, little-endian int32."""
        digest = hashlib.sha256(f"{tuple(self.input_ids.shape)}".encode())
        for tensor in (self.input_ids, self.seq_ids):
            for rows in tensor.split(ROWS_AT_ONCE):  # of a mapped file, never all in memory
                digest.update(rows.contiguous().numpy().astype("<i4").tobytes())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """What results.json says about this data."""
        return {"sha256": self.sha256, "tokens": self.num_tokens, "source": self.source}

    def save(self, path: str | Path) -> None:
        """One safetensors file, complete or not there at all.

        Raises:
            RnnzooError: no space or no permission.
        """
        from safetensors.torch import save_file

        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        keys = np.array(list(self.hashes.paragraphs), dtype=np.int64)
        tensors = {
            "input_ids": self.input_ids.contiguous(),
            "seq_ids": self.seq_ids.contiguous(),
            "paragraphs": torch.from_numpy(keys),
            "runs": torch.from_numpy(self.hashes.runs.view(np.int64).copy()),
        }
        about = {
            "source": self.source,
            "name": self.hashes.name,
            "every": str(self.hashes.every),
            "beginnings": json.dumps(list(self.hashes.paragraphs.values())),
        }
        with user_errors(f"The tokens cannot be saved to {path}"):
            try:
                save_file(tensors, partial, metadata=about)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> PackedTokens:
        """Raises RnnzooError where the file is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in ("input_ids", "seq_ids", "paragraphs", "runs")}
            hashes = TextHashes(about["name"])
            hashes.every = int(about["every"])
            hashes.paragraphs = dict(zip(tensors["paragraphs"].tolist(), json.loads(about["beginnings"]), strict=True))
            hashes.runs = tensors["runs"].numpy().view(np.uint64)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise RnnzooError(
                f"The token file {path} is missing or damaged ({error}); delete it and run again."
            ) from error
        return cls(tensors["input_ids"], tensors["seq_ids"], about["source"], hashes)


def pack(
    documents: Iterable[str],
    tokenizer: Any,
    seq_len: int,
    num_tokens: int | None,
    *,
    name: str = "training",
    source: str = "",
    exclude: Iterable[TextHashes] = (),
    long_documents: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackedTokens:
    """Reads documents until there are enough tokens.

    Args:
        documents: read no further than needed.
        tokenizer: adds its own special tokens (a BOS, if it has one) to each document.
        seq_len: T. num_tokens: about how many in all, rounded down to whole rows, at least one; None: all there are.
        name: what for, in messages. source: for the record.
        exclude: documents that share a paragraph or more than 1% of their 13-word runs with any of these are left out.
        long_documents: rows hold one document each, consecutive pieces of those that are long enough; shorter ones are
            packed only when these have run out. For lengths that must be learnt on text that is really that long.
        progress: called with (tokens packed, tokens wanted).
    Returns:
        Fewer rows than asked for if the text runs out; a warning is logged.
    Raises:
        RnnzooError: the documents do not fill a single row.
    """
    rows = sys.maxsize // seq_len if num_tokens is None else max(1, num_tokens // seq_len)
    hashes = TextHashes(name)
    packer = _Packer(rows, seq_len, long_documents, hashes)
    exclude, left_out = list(exclude), 0

    def usable() -> Iterator[str]:
        nonlocal left_out
        for text in documents:
            if packer.gave_up(text):
                return
            if any(other.shares(text) for other in exclude):
                left_out += 1
            elif packer.wants(text):
                yield text

    for text, ids in _tokenized(usable(), tokenizer):
        packer.add(ids, text)
        if progress is not None:
            progress(len(packer.done) * seq_len, rows * seq_len)
        if packer.full:
            break
    packer.finish()
    if left_out:
        log.info("%d documents that occur in other parts of the data were left out of the %s text", left_out, name)
    if not packer.done:
        raise RnnzooError(
            f"The {name} text ({source or 'given'}) has {len(packer.row)} tokens, less than one sequence of {seq_len}; "
            "give more text or a smaller sequence length."
        )
    if num_tokens is not None and len(packer.done) < rows:
        log.warning(
            "the %s text has only %d of the %d tokens asked for; all of it is used",
            name, len(packer.done) * seq_len, rows * seq_len,
        )  # fmt: skip
    input_ids, seq_ids = (torch.from_numpy(np.stack(part)) for part in zip(*packer.done, strict=True))
    return PackedTokens(input_ids, seq_ids, source, hashes)


def check_sequence_length(seq_len: int, config: Any, source: str = "The teacher") -> None:
    """Raises RnnzooError where a sequence is longer than the teacher's trained positions, or shorter than 2."""
    longest = config.max_position_embeddings
    if not 2 <= seq_len <= longest:
        raise RnnzooError(
            f"A sequence length of {seq_len} does not suit {source}, which was trained on positions up to {longest}; "
            f"choose between 2 and {longest}."
        )


class _Packer:
    """Fills rows; keeps what is only needed if the text runs out: ends of large documents, and short documents."""

    def __init__(self, rows: int, seq_len: int, long_documents: bool, hashes: TextHashes):
        self.rows, self.seq_len, self.long, self.hashes = rows, seq_len, long_documents, hashes
        self.done: list[tuple[np.ndarray, np.ndarray]] = []
        self.row: list[int] = []
        self.ids_in_row: list[int] = []
        self.spare: list[tuple[list[int], str]] = []
        self.short: list[tuple[list[int], str]] = []
        self.short_tokens = self.characters_seen = 0
        share = rows * seq_len // LARGEST_SHARE
        self.most = max(seq_len, share // seq_len * seq_len)

    @property
    def full(self) -> bool:
        return len(self.done) >= self.rows

    def gave_up(self, text: str) -> bool:
        """Whether an endless stream of short documents has been searched long enough for long ones."""
        self.characters_seen += len(text)
        return self.long and self.characters_seen > SEARCH_FACTOR * 4 * self.rows * self.seq_len

    def wants(self, text: str) -> bool:
        may_be_long = len(text) >= CHARACTERS_PER_TOKEN * self.seq_len
        return not self.long or may_be_long or self.short_tokens < self.rows * self.seq_len

    def add(self, ids: list[int], text: str) -> None:
        if self.long and len(ids) < self.seq_len:
            self.short.append((ids, text))
            self.short_tokens += len(ids)
            return
        if len(ids) > self.most:
            self.spare.append((ids[self.most :], text))
        self._use(ids[: self.most], text)

    def finish(self) -> None:
        """The text has run out: use what was put aside."""
        for ids, text in self.spare:
            self._use(ids, text)
        self.long = False
        for ids, text in self.short:
            self._use(ids, text)

    def _use(self, ids: list[int], text: str) -> None:
        if self.full:
            return
        if self.long:  # the end that fills no row of its own waits with the short ones
            whole = len(ids) // self.seq_len * self.seq_len
            self.short.append((ids[whole:], text))
            ids = ids[:whole]
        if ids:
            self.hashes.add(text)
        document = self.ids_in_row[-1] + 1 if self.row else 0
        while ids and not self.full:
            room = self.seq_len - len(self.row)
            self.row += ids[:room]
            self.ids_in_row += [document] * min(room, len(ids))
            ids = ids[room:]
            if len(self.row) == self.seq_len:
                self.done.append((np.array(self.row, np.int32), np.array(self.ids_in_row, np.int32)))
                self.row, self.ids_in_row, document = [], [], 0


def _tokenized(texts: Iterable[str], tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    batch: list[str] = []
    size = 0

    def tokens() -> Iterator[tuple[str, list[int]]]:
        ids = tokenizer(batch, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
        return zip(batch, ids, strict=True)

    for text in texts:
        batch.append(text)
        size += len(text)
        if size > CHARACTERS_AT_ONCE:
            yield from tokens()
            batch, size = [], 0
    if batch:
        yield from tokens()
