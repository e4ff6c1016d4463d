"""Selective scan in Triton, forward and backward.

A program holds the (BD, BN) states of a block of channels in registers and walks through a segment of time. Where batch
and channels alone give too few programs for the GPU, time is cut into segments: a first pass finds each segment's
product of decays and what it would end with from an empty state, `_join` chains these into the state before each
segment, and then all segments run at once. Backward does the same from the end. It makes the states of one chunk at a
time again, from those that forward kept, in a scratch buffer whose size does not grow with time, and leaves each
block's share of the sums over channels, dB and dC, for a second sum in fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import interpreted, tuned
from ..operators import contiguous, differentiable, needs_gradient
from ..steps import step_codes
from .operators import empty_gradients

CHUNK = 32  # steps whose states backward makes at once


@triton.jit
def _reach(code, n):
    """How many of n numbers are read: none of a masked step."""
    return tl.where(code == 2, 0, n)


@triton.jit
def _decay(dt, a, code):
    """exp(dt A) (BD, BN); zero where a document begins. A masked step has dt = 0."""
    return tl.where(code == 1, 0.0, tl.exp(dt[:, None] * a))


@triton.jit
def _edges(
    value, dt, a, vector, codes, product, local, time, width, states, length,
    REVERSED: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of each segment: the product of its decays, and the state it ends with from zeros (value = x, vector = B); or,
    REVERSED, the gradient that leaves it at its beginning from zeros at its end (value = dy, vector = C)."""
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    ds, ns = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    in_d, in_n = ds < width, ns < states
    both = in_d[:, None] & in_n[None, :]
    matrix = ds[:, None] * states + ns[None, :]
    rates = tl.load(a + matrix, mask=both, other=0.0)
    h, whole = tl.zeros((BD, BN), tl.float32), tl.full((BD, BN), 1.0, tl.float32)
    start = segment * length
    stop = tl.minimum(start + length, time)
    for i in range(stop - start):
        t = stop - 1 - i if REVERSED else start + i
        at = row * time + t
        code = tl.load(codes + at)
        seen_d, seen_n = _reach(code, width), _reach(code, states)
        v = tl.load(value + at * width + ds, mask=ds < seen_d, other=0.0).to(tl.float32)
        w = tl.load(dt + at * width + ds, mask=ds < seen_d, other=0.0).to(tl.float32)
        n = tl.load(vector + at * states + ns, mask=ns < seen_n, other=0.0).to(tl.float32)
        e = _decay(w, rates, code)
        h = (h + v[:, None] * n[None, :]) * e if REVERSED else h * e + (v * w)[:, None] * n[None, :]
        whole *= e
    to = (row * tl.num_programs(1) + segment) * width * states + matrix
    tl.store(product + to, whole, mask=both)
    tl.store(local + to, h, mask=both)


@triton.jit
def _join(
    first, product, local, joined, size, segments, REVERSED: tl.constexpr, HAS_FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """joined[s]: what goes into segment s; joined of the first (REVERSED: the last) segment is `first`, or zeros."""
    at, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = at < size
    h = tl.zeros((BLOCK,), tl.float32)
    if HAS_FIRST:
        h = tl.load(first + row * size + at, mask=inside, other=0.0)
    for i in range(segments):
        s = segments - 1 - i if REVERSED else i
        to = (row * segments + s) * size + at
        tl.store(joined + to, h, mask=inside)
        h = h * tl.load(product + to, mask=inside, other=0.0) + tl.load(local + to, mask=inside, other=0.0)


@triton.jit
def _forward_kernel(
    x, dt, a, b, c, d, starts, codes, y, final, kept, time, width, states, length,
    HAS_D: tl.constexpr, HAS_START: tl.constexpr, KEEP: tl.constexpr,
    CHUNK: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A segment's outputs; the last segment writes the final state."""
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments = tl.num_programs(1)
    ds, ns = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    in_d, in_n = ds < width, ns < states
    both = in_d[:, None] & in_n[None, :]
    matrix = ds[:, None] * states + ns[None, :]
    size = width * states
    rates = tl.load(a + matrix, mask=both, other=0.0)
    skip = tl.zeros((BD,), tl.float32)
    if HAS_D:
        skip = tl.load(d + ds, mask=in_d, other=0.0)
    h = tl.zeros((BD, BN), tl.float32)
    if HAS_START:
        h = tl.load(starts + (row * segments + segment) * size + matrix, mask=both, other=0.0)
    start = segment * length
    for t in range(start, tl.minimum(start + length, time)):
        at = row * time + t
        if KEEP and t % CHUNK == 0:
            tl.store(kept + (row * tl.cdiv(time, CHUNK) + t // CHUNK) * size + matrix, h, mask=both)
        code = tl.load(codes + at)
        seen_d, seen_n = _reach(code, width), _reach(code, states)
        x_t = tl.load(x + at * width + ds, mask=ds < seen_d, other=0.0).to(tl.float32)
        dt_t = tl.load(dt + at * width + ds, mask=ds < seen_d, other=0.0).to(tl.float32)
        b_t = tl.load(b + at * states + ns, mask=ns < seen_n, other=0.0).to(tl.float32)
        c_t = tl.load(c + at * states + ns, mask=ns < seen_n, other=0.0).to(tl.float32)
        h = h * _decay(dt_t, rates, code) + (x_t * dt_t)[:, None] * b_t[None, :]
        out = tl.sum(h * c_t[None, :], axis=1) + skip * x_t
        tl.store(y + at * width + ds, out.to(y.dtype.element_ty), mask=in_d)
    if segment == segments - 1:
        tl.store(final + row * size + matrix, h, mask=both)


@triton.jit
def _backward_kernel(
    x, dt, a, b, c, d, codes, kept, dy, ends, dx, ddt, da, db, dc, dd, dinitial, scratch, time, width, states, length,
    HAS_D: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A segment's gradients. ends: what comes into it from behind. da, dd: its sums over time; db, dc: the block's sums
    over channels, (blocks, B, T, N); the first segment writes dinitial."""
    block, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments = tl.num_programs(1)
    ds, ns = block * BD + tl.arange(0, BD), tl.arange(0, BN)
    in_d, in_n = ds < width, ns < states
    both = in_d[:, None] & in_n[None, :]
    matrix = ds[:, None] * states + ns[None, :]
    size = width * states
    rates = tl.load(a + matrix, mask=both, other=0.0)
    skip = tl.zeros((BD,), tl.float32)
    if HAS_D:
        skip = tl.load(d + ds, mask=in_d, other=0.0)
    part = (row * segments + segment) * size + matrix
    carry = tl.load(ends + part, mask=both, other=0.0)
    grad_a, grad_d = tl.zeros((BD, BN), tl.float32), tl.zeros((BD,), tl.float32)
    room = ((row * segments + segment) * tl.num_programs(0) + block) * (CHUNK * BD * BN)
    room += tl.arange(0, BD)[:, None] * BN + ns[None, :]
    sums = (block * tl.num_programs(2).to(tl.int64) + row) * time
    first_chunk, chunks = segment * length // CHUNK, tl.cdiv(time, CHUNK)
    stop_chunk = tl.minimum(first_chunk + length // CHUNK, chunks)
    for i in range(stop_chunk - first_chunk):
        chunk = stop_chunk - 1 - i
        start = chunk * CHUNK
        steps = tl.minimum(CHUNK, time - start)
        h = tl.load(kept + (row * chunks + chunk) * size + matrix, mask=both, other=0.0)
        for j in range(steps):
            at = row * time + start + j
            code = tl.load(codes + at)
            seen_d, seen_n = _reach(code, width), _reach(code, states)
            x_t = tl.load(x + at * width + ds, mask=ds < seen_d, other=0.0).to(tl.float32)
            dt_t = tl.load(dt + at * width + ds, mask=ds < seen_d, other=0.0).to(tl.float32)
            b_t = tl.load(b + at * states + ns, mask=ns < seen_n, other=0.0).to(tl.float32)
            tl.store(scratch + room + j * (BD * BN), h)
            h = h * _decay(dt_t, rates, code) + (x_t * dt_t)[:, None] * b_t[None, :]
        tl.debug_barrier()  # the scratch may be read by other threads than wrote it
        for j in range(steps):
            k = steps - 1 - j
            at = row * time + start + k
            code = tl.load(codes + at)
            seen_d, seen_n = _reach(code, width), _reach(code, states)
            x_t = tl.load(x + at * width + ds, mask=ds < seen_d, other=0.0).to(tl.float32)
            dt_t = tl.load(dt + at * width + ds, mask=ds < seen_d, other=0.0).to(tl.float32)
            dy_t = tl.load(dy + at * width + ds, mask=ds < seen_d, other=0.0).to(tl.float32)
            b_t = tl.load(b + at * states + ns, mask=ns < seen_n, other=0.0).to(tl.float32)
            c_t = tl.load(c + at * states + ns, mask=ns < seen_n, other=0.0).to(tl.float32)
            e, before = _decay(dt_t, rates, code), tl.load(scratch + room + k * (BD * BN))
            u = x_t * dt_t
            carry += dy_t[:, None] * c_t[None, :]
            # h stands after the step: of the chunk's last one from the loop above, then it is the next step's `before`
            tl.store(dc + (sums + start + k) * states + ns, tl.sum(dy_t[:, None] * h, axis=0), mask=in_n)
            tl.store(db + (sums + start + k) * states + ns, tl.sum(carry * u[:, None], axis=0), mask=in_n)
            h = before
            du = tl.sum(carry * b_t[None, :], axis=1)
            carry *= e
            dz = carry * before
            grad_a += dz * dt_t[:, None]
            grad_d += dy_t * x_t
            grad_dt = tl.sum(dz * rates, axis=1) + du * x_t
            tl.store(ddt + at * width + ds, tl.where(ds < seen_d, grad_dt, 0.0).to(ddt.dtype.element_ty), mask=in_d)
            tl.store(dx + at * width + ds, (du * dt_t + skip * dy_t).to(dx.dtype.element_ty), mask=in_d)
        tl.debug_barrier()
    tl.store(da + part, grad_a, mask=both)
    tl.store(dd + (row * segments + segment) * width + ds, grad_d, mask=in_d)
    if segment == 0:
        tl.store(dinitial + row * size + matrix, carry, mask=both)


class _Launch(NamedTuple):
    """Block widths, warps, steps a segment, and the grid (channel blocks, segments, batch)."""

    blocks: dict[str, int]
    warps: int
    length: int
    grid: tuple[int, int, int]


def _sizes(kernel: str, x: Tensor, a: Tensor, launch: Callable[[_Launch], None]) -> _Launch:
    """By rule 512 numbers of the state a program; RNNZOO_AUTOTUNE=1 tries others."""
    width, wide = x.shape[2], max(triton.next_power_of_2(a.shape[1]), 1)
    most = triton.next_power_of_2(width)
    channels = max(4, min(512 // wide, most))
    rule = {"BD": channels, "num_warps": 2 if channels * wide >= 512 else 1}
    others = [{"BD": size, "num_warps": warps} for size in (8, 16, 32, 64, 128) for warps in (1, 2, 4)]
    others = [sizes for sizes in others if sizes["BD"] <= max(8, most) and 128 <= sizes["BD"] * wide <= 2048]
    key = width, a.shape[1], str(x.dtype)
    sizes = tuned(f"selective_scan {kernel}", key, rule, others, lambda sizes: launch(_placed(x, wide, sizes)))
    return _placed(x, wide, sizes)


def _placed(x: Tensor, wide: int, sizes: dict[str, int]) -> _Launch:
    batch, time, width = x.shape
    across = triton.cdiv(width, sizes["BD"])
    # Without a GPU the interpreter tests segments on short inputs. On one, about eight programs keep a processor busy.
    programs = 64 if interpreted() else 8 * torch.cuda.get_device_properties(x.device).multi_processor_count
    wanted = max(1, programs // (batch * across))
    length = max(CHUNK if interpreted() else 8 * CHUNK, triton.cdiv(triton.cdiv(time, wanted), CHUNK) * CHUNK)
    return _Launch(
        {"BD": sizes["BD"], "BN": wide}, sizes["num_warps"], length, (across, triton.cdiv(time, length), batch)
    )


def _between(value, dt, a, vector, codes, first, reverse: bool, launch: _Launch) -> Tensor | None:
    """(B, segments, D, N): the state before each segment, or, reversed, the gradient behind it.

    Args:
        value, vector: x and B, or, reversed, dy and C. first: the state before all, or the gradient behind all.
    """
    blocks, warps, length, grid = launch
    batch, time, width = value.shape
    states, segments = a.shape[1], grid[1]
    if segments == 1:
        return first
    product, local, joined = (a.new_empty(batch, segments, width, states) for _ in range(3))
    _edges[grid](
        *(value, dt, a, vector, codes, product, local, time, width, states, length),
        REVERSED=reverse, **blocks, num_warps=warps,
    )  # fmt: skip
    size = width * states
    _join[(triton.cdiv(size, 128), batch)](
        *(first, product, local, joined, size, segments),
        REVERSED=reverse, HAS_FIRST=first is not None, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return joined


def selective_scan(
    *,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.selective_scan`."""
    a = a.to(torch.float32)
    d, initial_state = (None if tensor is None else tensor.to(torch.float32) for tensor in (d, initial_state))
    inputs = (x, dt, a, b, c, d, initial_state)
    codes = step_codes(seq_ids, mask)
    if codes is None:
        codes = torch.zeros(x.shape[:2], dtype=torch.uint8, device=x.device)
    y, state, _ = forward(*inputs, codes, needs_gradient(*inputs))
    return y, state


def _forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial: Tensor | None,
    codes: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, states before each chunk: what backward needs; empty unless `keep`)."""
    y, state, kept = _empty_outputs(x, dt, a, b, c, d, initial, codes, keep)
    x, dt, a, b, c, d, initial, codes = contiguous(x, dt, a, b, c, d, initial, codes)

    def launch(sizes: _Launch) -> None:
        starts = _between(x, dt, a, b, codes, initial, False, sizes)
        _forward_kernel[sizes.grid](
            *(x, dt, a, b, c, d, starts, codes, y, state, kept if keep else None, *x.shape[1:], a.shape[1]),
            *(sizes.length,),
            HAS_D=d is not None, HAS_START=starts is not None, KEEP=keep,
            CHUNK=CHUNK, **sizes.blocks, num_warps=sizes.warps,
        )  # fmt: skip

    launch(_sizes("forward", x, a, launch))
    return y, state, kept


def _empty_outputs(x, dt, a, b, c, d, initial, codes, keep):
    batch, time, width = x.shape
    chunks = -(-time // CHUNK) if keep else 0
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        a.new_empty(batch, width, a.shape[1]),
        a.new_empty(batch, chunks, width, a.shape[1]),
    )


def _backward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    codes: Tensor,
    kept: Tensor,
    dy: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, d (empty without one) and the initial state."""
    x, dt, a, b, c, d, codes, kept, dy, dstate = contiguous(x, dt, a, b, c, d, codes, kept, dy, dstate)
    batch, time, width = x.shape
    states = a.shape[1]
    dx, ddt, dinitial = (torch.empty_like(tensor) for tensor in (x, dt, dstate))
    sums: list[Tensor] = []

    def launch(sizes: _Launch) -> None:
        across, segments, _ = sizes.grid
        da, dd = a.new_empty(batch, segments, width, states), a.new_empty(batch, segments, width)
        db, dc = (a.new_empty(across, batch, time, states) for _ in range(2))
        scratch = a.new_empty(batch * segments * across * CHUNK * sizes.blocks["BD"] * sizes.blocks["BN"])
        ends = _between(dy, dt, a, c, codes, dstate, True, sizes)
        _backward_kernel[sizes.grid](
            *(x, dt, a, b, c, d, codes, kept, dy, ends, dx, ddt, da, db, dc, dd, dinitial, scratch),
            *(time, width, states, sizes.length),
            HAS_D=d is not None, CHUNK=CHUNK, **sizes.blocks, num_warps=sizes.warps,
        )  # fmt: skip
        sums[:] = da, db, dc, dd

    launch(_sizes("backward", x, a, launch))
    da, db, dc, dd = sums
    grad_d = a.new_empty(0) if d is None else dd.sum((0, 1))
    return dx, ddt, da.sum((0, 1)), db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype), grad_d, dinitial


forward = differentiable("selective_scan_triton", _forward, _backward, _empty_outputs, empty_gradients, "y state kept")
