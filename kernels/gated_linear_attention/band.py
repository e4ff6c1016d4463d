"""Softmax attention over a band of recent keys and a few sink keys, with a hand-written backward.

Query rows are cut into blocks of C steps; a block sees the keys of its own steps and of the `length` steps before. A
tile is a run of blocks that are worked on together. Scores are formed again in the backward, so that nothing of size
T x length is kept:

    P = exp(S - lse),  dV = P^T dY,  dS = P * (dY V^T - rowsum(dY * Y) + dlse),  dQ = dS K,  dK = dS^T Q

(FlashAttention, Dao et al. 2022, section 3.1, with a gradient for lse.) The few sink columns are worked on for all
blocks at once, outside the tiles. Steps count from 0 in this call; step -n is the n-th last token before it, from the
initial state's ring.

Layouts: heads = batch * key/value heads of one length; rows = C * group, group query heads of a step side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dtypes import state_dtype

TILE = 1 << 18  # scores per tile on a CPU: one megabyte in float32, so that a tile stays in the cache
NOWHERE = -(1 << 50)  # where a document begins that no step belongs to


@dataclass
class Band:
    """Geometry of one group of heads with equal lengths.

    batch: B. group: query heads per key head. length: steps in the window. sinks: how many.
    time: T; size: C; tiles: ranges of blocks. prefix: steps before 0 that the keys begin with.
    starts: (B, blocks * C) the step at which each step's document began (NOWHERE behind T), None: 0 for all.
    plain: for each block, whether no document begins within its band.
    sink_starts, sink_steps: (B, blocks or 1, columns): document and step of each block's sink columns.
    """

    batch: int
    group: int
    length: int
    sinks: int
    scale: float
    anchored_at_max: bool
    time: int
    size: int
    tiles: list[range]
    prefix: int
    starts: Tensor | None
    plain: list[bool]
    sink_starts: Tensor = field(default_factory=lambda: torch.empty(0))
    sink_steps: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def blocks(self) -> int:
        return self.tiles[-1].stop

    def width(self, tile: range) -> int:
        """Keys that each block of a tile sees: fewer where the keys' beginning is near."""
        return self.size + min(self.length, (tile.stop - 1) * self.size + self.prefix)

    def to_blocks(self, x: Tensor) -> Tensor:
        """(heads, T, group, n) -> (blocks, heads, C * group, n), zeros behind T."""
        x = F.pad(x, (0, 0, 0, 0, 0, self.blocks * self.size - self.time))
        return x.unflatten(1, (self.blocks, self.size)).transpose(0, 1).flatten(2, 3).contiguous()

    def from_blocks(self, x: Tensor) -> Tensor:
        """(blocks, heads, C * group, n) -> (heads, T, group, n)."""
        return x.unflatten(2, (self.size, self.group)).transpose(0, 1).flatten(1, 2)[:, : self.time]


def block_size(length: int, time: int, device: torch.device) -> int:
    """C: a larger block wastes more of its band (C of C + length columns), a smaller one makes products inefficient."""
    if device.type == "cpu":
        size = 16 if length <= 32 else 32 if length <= 384 else 64
    else:
        size = 64 if length <= 128 else 128
    return min(size, time)


def tile_ranges(blocks: int, scores_per_block: int, device: torch.device) -> list[range]:
    """Blocks that are worked on together: in cache on a CPU, all at once on a GPU up to a gigabyte of scores."""
    most = TILE if device.type == "cpu" else 1 << 28
    step = max(1, min(blocks, most // scores_per_block))
    return [range(first, min(first + step, blocks)) for first in range(0, blocks, step)]


def band_bias(band: Band, tile: range, shared: dict[int, Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where a step sees a key of the band, else minus infinity: (blocks or 1, B or 1, C, width)."""
    width = band.width(tile)
    plain = all(band.plain[block] for block in tile)
    if plain and width in shared:
        return shared[width]
    block = torch.arange(tile.start, tile.start + 1 if plain else tile.stop, device=device)
    steps = (block[:, None] * band.size + torch.arange(band.size, device=device))[:, None, :, None]
    past = ((block[:, None] + 1) * band.size + torch.arange(-width, 0, device=device))[:, None, None]
    seen = (past <= steps) & (past > steps - band.length)
    if not plain:
        starts = 0
        if band.starts is not None:
            starts = band.starts.unflatten(1, (-1, band.size))[:, tile.start : tile.stop].transpose(0, 1)[..., None]
        seen = seen & (past >= starts + band.sinks)
    bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
    if plain:
        shared[width] = bias
    return bias


def sink_bias(band: Band, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where a step sees a sink column, else minus infinity: (blocks, B or 1, C, columns)."""
    steps = torch.arange(band.blocks * band.size, device=device).view(1, band.blocks, band.size, 1)
    starts = torch.zeros_like(steps)
    if band.starts is not None:
        starts = band.starts.view(-1, band.blocks, band.size, 1)
    seen = (band.sink_starts[:, :, None] == starts) & (band.sink_steps[:, :, None] <= steps)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf).transpose(0, 1)


class Scores:
    """The scores of a band's tiles and sink columns."""

    def __init__(self, band: Band, q: Tensor, q_sink: Tensor, k: Tensor):
        self.band, self.q, self.q_sink = band, q, q_sink
        self.dtype = state_dtype(q.dtype)
        self.margin = max(0, band.tiles[0].stop * band.size - band.size - band.prefix)
        self.k = self.widen(k)
        self.shared: dict[int, Tensor] = {}

    def widen(self, x: Tensor) -> Tensor:
        """(heads, prefix + T, n) with zeros in front, for the first tile, and behind, for the last block."""
        return F.pad(x, (0, 0, self.margin, self.band.blocks * self.band.size - self.band.time))

    def keys(self, x: Tensor, tile: range) -> Tensor:
        """What the tile's blocks see of the widened x: (blocks of the tile * heads, width, n)."""
        band, width = self.band, self.band.width(tile)
        begin = self.margin + band.prefix + (tile.start + 1) * band.size - width
        seen = x[:, begin : begin + width + (len(tile) - 1) * band.size].unfold(1, width, band.size)
        return seen.transpose(0, 1).transpose(2, 3).flatten(0, 1)

    def add_to_keys(self, total: Tensor, part: Tensor, tile: range) -> None:
        """Adds part (blocks of the tile * heads, width, n) to the widened total, the reverse of `keys`."""
        band, width = self.band, self.band.width(tile)
        begin = self.margin + band.prefix + (tile.start + 1) * band.size - width
        for place, block in enumerate(part.unflatten(0, (len(tile), -1))):
            first = begin + place * band.size
            total[:, first : first + width] += block

    def tile(self, tile: range) -> Tensor:
        """(blocks of the tile * heads, rows, width)."""
        band = self.band
        rows = self.q[tile.start : tile.stop].flatten(0, 1)
        scores = (rows @ self.keys(self.k, tile).transpose(1, 2)).to(self.dtype).mul_(band.scale)
        bias = band_bias(band, tile, self.shared, self.dtype, rows.device)
        view = scores.view(len(tile), band.batch, -1, band.size, band.group, scores.shape[-1])
        view += bias[:, :, None, :, None]
        return scores

    def sinks(self, sink_k: Tensor) -> Tensor:
        """(blocks, heads, rows, columns)."""
        band = self.band
        scores = (self.q_sink @ sink_k.transpose(-1, -2)).to(self.dtype).mul_(band.scale)
        bias = sink_bias(band, self.dtype, scores.device)
        view = scores.view(band.blocks, band.batch, -1, band.size, band.group, scores.shape[-1])
        view += bias[:, :, None, :, None]
        return scores


class BandAttention(torch.autograd.Function):
    """Softmax average y and lse (and the largest score with anchor "max") of every query row.

    q, q_sink: (blocks, heads, rows, D). k, v: (heads, prefix + T, D and V).
    sink_k, sink_v: (blocks or 1, heads, columns, D and V).
    Returns y (blocks, heads, rows, V), lse and largest (blocks, heads, rows).
    """

    @staticmethod
    def forward(ctx, q, q_sink, k, v, sink_k, sink_v, band):
        scores = Scores(band, q, q if q_sink is None else q_sink, k)
        values = scores.widen(v)
        y = q.new_empty(*q.shape[:3], v.shape[-1], dtype=scores.dtype)
        lse = q.new_empty(q.shape[:3], dtype=scores.dtype)
        largest = torch.empty_like(lse)
        where = torch.empty_like(lse, dtype=torch.int64) if band.anchored_at_max else None
        sinks = None if sink_k is None else scores.sinks(sink_k)
        sinks_largest = None if sinks is None else sinks.amax(dim=-1)
        for tile in band.tiles:
            own = slice(tile.start, tile.stop)
            tile_scores = scores.tile(tile)
            if where is None:
                top = tile_scores.amax(dim=-1).view_as(lse[own])
            else:
                top, place = tile_scores.max(dim=-1)
                where[own] = place.view_as(lse[own])
                top = top.view_as(lse[own])
            if sinks_largest is not None:
                top = torch.maximum(top, sinks_largest[own])
            weights = tile_scores.sub_(top.flatten(0, 1)[..., None]).exp_()
            total = weights.sum(dim=-1).view_as(top)
            if sinks is not None:
                total += (sinks[own] - top[..., None]).exp_().sum(dim=-1)
            largest[own], lse[own] = top, total.log().add_(top)
            out = weights.to(v.dtype) @ scores.keys(values, tile)
            torch.div(out.view_as(y[own]), total[..., None], out=y[own])
        if sinks is not None:
            y += (sinks - lse[..., None]).exp_().to(v.dtype) @ sink_v
        ctx.band = band
        ctx.save_for_backward(q, q_sink, k, v, sink_k, sink_v, y, lse, where, largest if band.anchored_at_max else None)
        return (y, lse, largest) if band.anchored_at_max else (y, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_lse, grad_largest=None):
        q, q_sink, k, v, sink_k, sink_v, y, lse, where, largest = ctx.saved_tensors
        band = ctx.band
        scores = Scores(band, q, q if q_sink is None else q_sink, k)
        values = scores.widen(v)
        offset = grad_lse - torch.linalg.vecdot(grad_y, y)
        grad_y = grad_y.to(v.dtype).contiguous()
        grad_sink_rows = grad_sink_k = grad_sink_v = None
        if sink_k is not None:
            sinks = scores.sinks(sink_k)
            weights = sinks.sub(lse[..., None]).exp_()
            grad = (grad_y @ sink_v.transpose(-1, -2)).to(scores.dtype).add_(offset[..., None]).mul_(weights)
            if grad_largest is not None:
                top, place = sinks.max(dim=-1, keepdim=True)
                among_sinks = top == largest[..., None]
                grad.scatter_add_(-1, place, grad_largest[..., None] * among_sinks)
                grad_largest = grad_largest * ~among_sinks[..., 0]
            grad = grad.mul_(band.scale).to(q.dtype)
            grad_sink_rows = grad @ sink_k
            grad_sink_k = (grad.transpose(-1, -2) @ scores.q_sink).sum_to_size(sink_k.shape)
            grad_sink_v = (weights.to(v.dtype).transpose(-1, -2) @ grad_y).sum_to_size(sink_v.shape)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=scores.dtype) for x in (scores.k, values))
        for tile in band.tiles:
            own = slice(tile.start, tile.stop)
            rows, gy = q[own].flatten(0, 1), grad_y[own].flatten(0, 1)
            keys = scores.keys(scores.k, tile)
            weights = scores.tile(tile).sub_(lse[own].flatten(0, 1)[..., None]).exp_()
            grad = (gy @ scores.keys(values, tile).transpose(1, 2)).to(scores.dtype)
            grad.add_(offset[own].flatten(0, 1)[..., None]).mul_(weights)
            if grad_largest is not None:
                place, share = (x[own].flatten(0, 1)[..., None] for x in (where, grad_largest))
                grad.scatter_add_(-1, place, share)
            grad = grad.mul_(band.scale).to(q.dtype)
            scores.add_to_keys(grad_v, weights.to(v.dtype).transpose(1, 2) @ gy, tile)
            scores.add_to_keys(grad_k, grad.transpose(1, 2) @ rows, tile)
            grad_q[own] = (grad @ keys).view_as(q[own])
        if q_sink is None and grad_sink_rows is not None:
            grad_q, grad_sink_rows = grad_q + grad_sink_rows, None
        own = slice(scores.margin, scores.margin + k.shape[1])
        return (
            grad_q,
            grad_sink_rows,
            grad_k[:, own].to(k.dtype),
            grad_v[:, own].to(v.dtype),
            grad_sink_k,
            grad_sink_v,
            None,
        )
