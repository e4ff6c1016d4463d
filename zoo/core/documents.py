"""Padding and packing, brought to one form before any mixer sees them.

B batch, T tokens (columns) of this call. A column is a token or padding; a token belongs to a document.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...kernels.errors import RnnzooError, ShapeError

__all__ = [
    "Layout",
    "Progress",
    "documents_from_lengths",
    "documents_from_mask",
    "documents_from_positions",
    "lay_out",
    "padding_mask",
    "prefix_tokens",
]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where each row of the batch stands after the tokens so far.

    Attributes:
        seen: (B,) int64, tokens of the current document.
        last_id: (B,) the current document's id, None while the caller has not named documents.
    """

    seen: Tensor
    last_id: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one call means.

    Attributes:
        seq_ids: (B, T) int64, documents counted from 0 (0 goes on with the cached one), padding carries its
            predecessor's; None where the call holds one document.
        positions: (B, T) or (1, T) int64, tokens of the same document before this one.
        restart: (B,) bool, rows whose first token begins another document than the cached one; None: no row.
        progress: after the call.
    """

    seq_ids: Tensor | None
    positions: Tensor
    restart: Tensor | None
    progress: Progress


def padding_mask(attention_mask: Tensor | dict | None, batch: int, time: int) -> Tensor | None:
    """(B, T) bool for this call's columns, out of a mask over the whole past or of generate's dictionary of masks.

    Returns None where every column is a token.

    Raises:
        ShapeError: not (B, L) with L >= T.
    """
    attention_mask = _two_dimensional(attention_mask)
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < time:
        raise ShapeError(
            f"attention_mask has shape {shape}, expected ({batch}, {time}) or more columns (the cached ones first); "
            "recurrent layers take a mask of padding, not a matrix of attention."
        )
    mask = attention_mask[:, shape[1] - time :].bool()
    return None if bool(mask.all()) else mask


def documents_from_mask(attention_mask: Tensor | dict | None, time: int) -> Tensor | None:
    """(B, T) document ids of a mask that numbers a row's documents 1, 2, ..., padding 0; None: it is of zeros and ones.

    Raises:
        RnnzooError: other values, or numbers for columns of earlier calls, too.
    """
    mask = _two_dimensional(attention_mask)
    if mask is None or mask.dtype == torch.bool or mask.numel() == 0:
        return None
    lowest, highest = (float(x) for x in mask.aminmax())
    if lowest < 0 or (mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all())):
        raise RnnzooError(
            f"attention_mask has values from {lowest:g} to {highest:g}; expected 1 for tokens and 0 for padding, or "
            "integers that number the documents of a row from 1."
        )
    if highest <= 1:
        return None
    if mask.shape[1] != time:
        raise RnnzooError(
            f"attention_mask numbers documents (up to {highest:g}) over {mask.shape[1]} columns, but the call has "
            f"{time}; pass seq_ids for the columns of the call."
        )
    return mask


def _two_dimensional(attention_mask: Tensor | dict | None) -> Tensor | None:
    """The mask of padding among generate's."""
    if not isinstance(attention_mask, dict):
        return attention_mask
    masks = [m for m in attention_mask.values() if m is not None]
    return next((m for m in masks if m.dim() == 2), masks[0] if masks else None)


def documents_from_positions(position_ids: Tensor | None, mask: Tensor | None, batch: int, time: int) -> Tensor | None:
    """(B, T) document ids of a packed batch, whose positions start again at 0 within this call; None: not packed."""
    if position_ids is None or time == 1 or position_ids.dim() != 2 or position_ids.shape[1] != time:
        return None
    starts = position_ids.expand(batch, time) == 0
    if mask is not None:
        starts = starts & mask
        after_a_token = mask.long().cumsum(1) - mask.long() > 0
    else:
        after_a_token = torch.arange(time, device=starts.device).expand(batch, time) > 0
    starts = starts & after_a_token
    return starts.long().cumsum(1) if bool(starts.any()) else None


def documents_from_lengths(cumulative: Tensor, batch: int, time: int) -> Tensor:
    """(1, T) document ids of one row of packed documents, from their cumulative lengths (0, n1, n1 + n2, ...).

    Raises:
        ShapeError: several rows, or lengths that are not of this row.
    """
    if batch != 1:
        raise ShapeError(
            f"Cumulative lengths of documents are for one row, but the call has {batch}; pass seq_ids, one per token."
        )
    fits = cumulative.dim() == 1 and len(cumulative) > 1 and int(cumulative[0]) == 0 and int(cumulative[-1]) <= time
    if not fits or bool((cumulative.diff() < 0).any()):
        raise ShapeError(
            f"Cumulative lengths of documents are {cumulative.tolist()}; expected 0, n1, n1 + n2, ..., at most {time}."
        )
    return (torch.bucketize(torch.arange(time, device=cumulative.device), cumulative, right=True) - 1)[None]


def lay_out(
    progress: Progress | None, mask: Tensor | None, ids: Tensor | None, named: bool, shape: tuple[int, int], device
) -> Layout:
    """Positions, documents and progress of a call.

    Args:
        progress: before the call; None: nothing seen.
        mask: (B, T) bool or None. ids: (B, T) integers or None; ids of padding are ignored.
        named: `ids` came from the caller, so that they can be compared with those of the last call.
        shape: (B, T).
    """
    batch, time = shape
    seen = progress.seen if progress is not None else None
    last_id = progress.last_id if progress is not None else None
    if mask is None and ids is None:
        if seen is not None and time == 1:
            return Layout(None, seen[:, None], None, Progress(seen + 1, last_id))
        positions = torch.arange(time, device=device)[None]
        if seen is not None:
            positions = positions + seen[:, None]
            return Layout(None, positions, None, Progress(seen + time, last_id))
        return Layout(None, positions, None, Progress(torch.full((batch,), time, device=device)))

    seen = seen if seen is not None else torch.zeros(batch, dtype=torch.long, device=device)
    token = mask.long() if mask is not None else torch.ones(batch, time, dtype=torch.long, device=device)
    count = token.cumsum(1)
    if ids is None:
        positions = (seen[:, None] + count - 1).clamp(min=0)
        return Layout(None, positions, None, Progress(seen + count[:, -1], last_id))

    # Index of the last token at or before each column, -1 where there is none yet.
    column = torch.arange(time, device=device).expand(batch, time)
    latest = torch.where(token.bool(), column, -1).cummax(1).values
    earlier = torch.cat([latest.new_full((batch, 1), -1), latest[:, :-1]], 1)
    begins = token.bool() & (earlier >= 0) & (ids != ids.gather(1, earlier.clamp(min=0)))
    documents = begins.long().cumsum(1)

    restart = None
    final = latest[:, -1:]
    if named:
        if last_id is not None:
            first = token.argmax(1, keepdim=True)
            restart = (final[:, 0] >= 0) & (ids.gather(1, first)[:, 0] != last_id)
            seen = seen.masked_fill(restart, 0)
        newest = ids.gather(1, final.clamp(min=0))[:, 0]
        last_id = newest if last_id is None else torch.where(final[:, 0] >= 0, newest, last_id)
    before = torch.where(begins, count - 1, 0).cummax(1).values  # tokens of this call in earlier documents
    carried = torch.where(documents == 0, seen[:, None], 0)
    after = count - before + carried
    return Layout(documents, (after - 1).clamp(min=0), restart, Progress(after[:, -1], last_id))


def prefix_tokens(prefix: Tensor, mask: Tensor | None, layout: Layout, shape: tuple[int, int]) -> Tensor | None:
    """(B, T) bool: which columns are tokens of a prefix; None where none is.

    Raises:
        ShapeError: `prefix` is not (B, T). RnnzooError: it is in a document that began in an earlier call, whose tokens
            have not seen it.
    """
    if tuple(prefix.shape) != shape:
        raise ShapeError(
            f"prefix_mask has shape {tuple(prefix.shape)}, expected {shape}: one value per token of the call."
        )
    token = torch.ones_like(prefix, dtype=torch.bool) if mask is None else mask
    prefix = prefix.bool() & token
    first = token if layout.seq_ids is None else token & (layout.seq_ids == 0)
    begins = (first & (layout.positions == 0)).any(1, keepdim=True)
    if bool((prefix & first & ~begins).any()):
        raise RnnzooError(
            "prefix_mask marks tokens of a document that began in an earlier call; the whole prefix has to arrive in "
            "the call in which its document begins (generate: without prefill_chunk_size)."
        )
    return prefix if bool(prefix.any()) else None
