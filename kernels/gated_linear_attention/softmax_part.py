"""From the arguments of a call with a window to the bands of `band.py` and back: one band for each distinct length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .band import NOWHERE, Band, BandAttention, block_size, tile_ranges
from .state import Window, WindowState, ring_offsets


def softmax_part(
    window: Window, v: Tensor, state: WindowState | None, starts: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Softmax average over window and sinks.

    Args:
        v: (B, T, Hk, V). state: None at the beginning of a document.
        starts: (B, T) step at which each step's document began; None: 0 everywhere.
        resets: (B, T) True at the first step of every document but the row's first.
    Returns:
        y (B, T, H, V), lse (B, T, H) and, with anchor "max", the largest score (B, T, H), else None; in `state_dtype`.
    """
    batch, kv_heads = len(v), v.shape[2]
    group = window.q.shape[2] // kv_heads
    queries = window.q.unflatten(2, (kv_heads, group)).unbind(2)
    sink_queries = None
    if window.q_sink is not None and window.sinks:
        sink_queries = window.q_sink.unflatten(2, (kv_heads, group)).unbind(2)
    keys, values = window.k.unbind(2), v.unbind(2)
    results: list[tuple[Tensor, ...]] = [()] * kv_heads
    for length in sorted(set(window.lengths)):
        heads = [head for head in range(kv_heads) if window.lengths[head] == length]

        def pick(parts: tuple[Tensor, ...]) -> Tensor:
            """Per-head tensors (B, T, ...) -> (B * heads, T, ...)."""
            return torch.stack([parts[head] for head in heads], dim=1).flatten(0, 1)  # noqa: B023

        band = _band(window, length, len(heads), v, state, starts)
        k, v_ = pick(keys), pick(values)
        sink_k = sink_v = None
        if window.sinks:
            columns = _sink_columns(band, starts, resets, v.device)
            sink_k = _take_sinks(k, None if state is None else state.sink_k[:, heads], columns)
            sink_v = _take_sinks(v_, None if state is None else state.sink_v[:, heads], columns)
        if state is not None:
            rows = torch.remainder(state.count[:, None] + torch.arange(-length, 0, device=v.device), length)
            k = torch.cat([_chronological(state.ring_k, window.lengths, heads, rows).to(k.dtype), k], dim=1)
            v_ = torch.cat([_chronological(state.ring_v, window.lengths, heads, rows).to(v_.dtype), v_], dim=1)
        q_sink = None if sink_queries is None else band.to_blocks(pick(sink_queries))
        parts = BandAttention.apply(band.to_blocks(pick(queries)), q_sink, k, v_, sink_k, sink_v, band)
        parts = [band.from_blocks(part if part.ndim == 4 else part[..., None]) for part in parts]
        for place, head in enumerate(heads):
            results[head] = tuple(part.unflatten(0, (batch, len(heads)))[:, place] for part in parts)
    merged = [torch.stack(parts, dim=2).flatten(2, 3) for parts in zip(*results, strict=True)]
    return merged[0], merged[1].squeeze(-1), merged[2].squeeze(-1) if len(merged) > 2 else None


def _chronological(ring: Tensor, lengths: tuple[int, ...], heads: list[int], rows: Tensor) -> Tensor:
    """Ring rows (B, R, n) of some heads of one length, oldest first: (B * heads, length, n)."""
    offsets = ring_offsets(lengths)
    own = torch.stack([ring[:, offsets[head] : offsets[head] + rows.shape[1]] for head in heads], dim=1)
    return own.gather(2, rows[:, None, :, None].expand_as(own)).flatten(0, 1)


def _band(window: Window, length: int, heads: int, v: Tensor, state: WindowState | None, starts: Tensor | None) -> Band:
    batch, time, kv_heads, _ = v.shape
    group = window.q.shape[2] // kv_heads
    prefix = 0 if state is None else length
    size = block_size(length, time, v.device)
    blocks = -(-time // size)
    width = size + min(length, time + prefix)
    latest = [0] * blocks
    if starts is not None:
        starts = F.pad(starts, (0, blocks * size - time), value=NOWHERE)
        latest = starts.unflatten(1, (blocks, size)).amax(dim=(0, 2)).tolist()
    return Band(
        batch=batch,
        group=group,
        length=length,
        sinks=window.sinks,
        scale=window.k.shape[-1] ** -0.5 if window.scale is None else window.scale,
        anchored_at_max=window.anchor == "max",
        time=time,
        size=size,
        tiles=tile_ranges(blocks, batch * heads * group * size * width, v.device),
        prefix=prefix,
        starts=starts,
        plain=[latest[block] + window.sinks <= block * size - length + 1 for block in range(blocks)],
    )


def _sink_columns(band: Band, starts: Tensor | None, resets: Tensor | None, device: torch.device) -> Tensor:
    """Sets the band's sink columns; returns where they are found, (B, blocks or 1, columns).

    That is a step, or -n for row n-1 of the initial state's sinks.
    """
    first = torch.arange(band.sinks, device=device)
    if starts is None:
        document = torch.zeros(band.batch, 1, 1, dtype=torch.int64, device=device)
    elif resets is None:
        document = starts[:, :1, None]
    else:  # every document that has a step in the block
        index = resets.cumsum(dim=1)
        bounds = torch.arange(band.blocks, device=device) * band.size
        low, high = index[:, bounds], index[:, (bounds + band.size - 1).clamp(max=band.time - 1)]
        most = int((high - low).max()) + 1
        table = torch.full(index.shape, NOWHERE, device=device).scatter(1, index, starts)
        wanted = low[:, :, None] + torch.arange(most, device=device)
        found = table.gather(1, wanted.clamp(max=band.time - 1).flatten(1)).view_as(wanted)
        document = torch.where(wanted <= high[:, :, None], found, NOWHERE)
    band.sink_starts = document.repeat_interleave(band.sinks, dim=2)
    token = first.repeat(document.shape[2])
    band.sink_steps = band.sink_starts + token
    return torch.where(band.sink_steps < 0, -1 - token, band.sink_steps)


def _take_sinks(new: Tensor, old: Tensor | None, columns: Tensor) -> Tensor:
    """Keys or values of the sink columns.

    new: (B * heads, T, n). old: (B, heads, sinks, n) of the initial state.
    Returns (blocks or 1, B * heads, columns, n).
    """
    batch = len(columns)
    new = new.unflatten(0, (batch, -1))
    sinks = 0 if old is None else old.shape[2]
    source = new if old is None else torch.cat([old.to(new.dtype), new], dim=2)
    rows = torch.where(columns < 0, -1 - columns, columns + sinks).clamp(0, source.shape[2] - 1)
    taken = source.gather(2, rows.flatten(1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
    return taken.unflatten(2, rows.shape[1:]).flatten(0, 1).transpose(0, 1)
