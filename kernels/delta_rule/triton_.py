"""Delta rule on GPUs, in Triton: a program is a head and a block of value columns, with its state in registers.

Backward goes through time in chunks, last first; it makes the states of a chunk again, from the one before it that
forward kept, into a scratch of one chunk for each program. The equations of backward stand in `cpu.c`. Sums over the
columns are kept for each block of them, and added in order at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import tuned
from ..operators import contiguous, differentiable
from .operators import CHUNK, empty_gradients, empty_outputs, fused


@triton.jit
def load_code(codes, position, HAS_CODES: tl.constexpr):
    """What a step is, a scalar: CONTINUES (0), BEGINS (1) or SKIPPED (2)."""
    code = (position * 0).to(tl.int32)
    if HAS_CODES:
        code = tl.load(codes + position).to(tl.int32)
    return code


@triton.jit
def load_row(tensor, row, width, i, code):
    """Row `row` of (rows, width) in float32; zeros beyond the width and at skipped steps, whatever stands there."""
    there = tl.where(code == 2, 0, width)
    return tl.load(tensor + row * width + i, mask=i < there, other=0.0).to(tl.float32)


@triton.jit
def load_decay(g, row, K, i, code, DECAY: tl.constexpr):
    """The factor exp(g); DECAY: 0 none, 1 g is (rows, 1), 2 it is (rows, K)."""
    logs = tl.zeros(i.shape, tl.float32)
    if DECAY == 1:
        logs += tl.load(g + row, mask=code != 2, other=0.0)
    if DECAY == 2:
        logs += load_row(g, row, K, i, code)
    return tl.exp(logs)


@triton.jit
def advance(s, k, v, a, b, g, row, K, V, i, j, code, DECAY: tl.constexpr):
    """The state after a step."""
    k_t, a_t, b_t = load_row(k, row, K, i, code), load_row(a, row, K, i, code), load_row(b, row, K, i, code)
    e = load_decay(g, row, K, i, code, DECAY)
    before = tl.where(code == 1, 0.0, s)
    u = tl.sum(b_t[:, None] * before, 0)
    after = e[:, None] * before + a_t[:, None] * u[None, :] + k_t[:, None] * load_row(v, row, V, j, code)[None, :]
    return tl.where(code == 2, s, after)


@triton.jit
def forward_kernel(
    q, k, v, a, b, g, initial, codes, o, final, kept, scale, T, H, K, V,
    HAS_INITIAL: tl.constexpr, HAS_CODES: tl.constexpr, KEEP: tl.constexpr, DECAY: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    matrix = i[:, None] * V + j[None, :]
    inside = (i < K)[:, None] & (j < V)[None, :]
    s = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        s = tl.load(initial + head * K * V + matrix, mask=inside, other=0.0)
    chunks = tl.cdiv(T, CHUNK)
    for chunk in range(chunks):
        if KEEP:
            tl.store(kept + (head * chunks + chunk) * K * V + matrix, s, mask=inside)
        for t in range(chunk * CHUNK, tl.minimum(T, chunk * CHUNK + CHUNK)):
            position = head // H * T + t
            row = position * H + head % H
            code = load_code(codes, position, HAS_CODES)
            s = advance(s, k, v, a, b, g, row, K, V, i, j, code, DECAY)
            for other in tl.static_range(GROUPS):  # pyright: ignore
                q_t = load_row(q, row * GROUPS + other, K, i, code)
                o_t = tl.where(code == 2, 0.0, scale * tl.sum(q_t[:, None] * s, 0))
                tl.store(o + (row * GROUPS + other) * V + j, o_t.to(o.dtype.element_ty), mask=j < V)
    tl.store(final + head * K * V + matrix, s, mask=inside)


@triton.jit
def store_row(tensor, row, width, i, x, code):
    tl.store(tensor + row * width + i, tl.where(code == 2, 0.0, x).to(tensor.dtype.element_ty), mask=i < width)


@triton.jit
def backward_kernel(
    q, k, v, a, b, g, codes, kept, d_out, d_final, scratch, dq, dk, dv, da, db, dg, d_initial, scale, B, T, H, K, V,
    HAS_CODES: tl.constexpr, DECAY: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, j = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    matrix = i[:, None] * V + j[None, :]
    inside = (i < K)[:, None] & (j < V)[None, :]
    own = (head * tl.num_programs(1) + block) * CHUNK * BK * BV + i[:, None] * BV + tl.arange(0, BV)[None, :]
    part = block * B * T * H  # rows of the sums over this block's columns
    adjoint = tl.load(d_final + head * K * V + matrix, mask=inside, other=0.0)
    chunks = tl.cdiv(T, CHUNK)
    for back in range(chunks):
        start = (chunks - 1 - back) * CHUNK
        steps = tl.minimum(T - start, CHUNK)
        first = head // H * T + start
        after = tl.load(kept + (head * chunks + chunks - 1 - back) * K * V + matrix, mask=inside, other=0.0)
        for n in range(steps):
            tl.store(scratch + own + n * BK * BV, after)
            code = load_code(codes, first + n, HAS_CODES)
            after = advance(after, k, v, a, b, g, (first + n) * H + head % H, K, V, i, j, code, DECAY)
        tl.debug_barrier()  # other threads of the program may read what this one wrote
        for n_back in range(steps):
            n = steps - 1 - n_back
            code = load_code(codes, first + n, HAS_CODES)
            row = (first + n) * H + head % H
            state = tl.load(scratch + own + n * BK * BV)
            before = tl.where(code == 1, 0.0, state)
            for other in tl.static_range(GROUPS):  # pyright: ignore
                at = row * GROUPS + other
                d_t, q_t = scale * load_row(d_out, at, V, j, code), load_row(q, at, K, i, code)
                store_row(dq, part * GROUPS + at, K, i, tl.sum(after * d_t[None, :], 1), code)
                adjoint += q_t[:, None] * d_t[None, :]
            k_t, a_t, b_t = load_row(k, row, K, i, code), load_row(a, row, K, i, code), load_row(b, row, K, i, code)
            v_t, e = load_row(v, row, V, j, code), load_decay(g, row, K, i, code, DECAY)
            u = tl.sum(b_t[:, None] * before, 0)
            du = tl.sum(a_t[:, None] * adjoint, 0)
            store_row(da, part + row, K, i, tl.sum(adjoint * u[None, :], 1), code)
            store_row(db, part + row, K, i, tl.sum(before * du[None, :], 1), code)
            store_row(dk, part + row, K, i, tl.sum(adjoint * v_t[None, :], 1), code)
            store_row(dv, row, V, j, tl.sum(adjoint * k_t[:, None], 0), code)
            dg_t = e * tl.sum(adjoint * before, 1)
            if DECAY == 1:
                tl.store(dg + part + row, tl.where(code == 2, 0.0, tl.sum(dg_t, 0)))
            if DECAY == 2:
                store_row(dg, part + row, K, i, dg_t, code)
            previous = e[:, None] * adjoint + b_t[:, None] * du[None, :]
            adjoint = tl.where(code == 2, adjoint, tl.where(code == 1, 0.0, previous))
            after = state
        tl.debug_barrier()
    tl.store(d_initial + head * K * V + matrix, adjoint, mask=inside)


def _sizes(kernel: str, q: Tensor, v: Tensor, most: int, launch: Callable[[dict[str, int]], None]) -> dict[str, int]:
    """Rows and columns of a program's state, and warps: all rows, and so many columns that the registers hold it."""
    rows = max(16, triton.next_power_of_2(q.shape[-1]))
    columns = min(max(16, triton.next_power_of_2(v.shape[-1])), max(16, most // rows))
    rule = {"rows": rows, "columns": columns, "num_warps": 4 if rows < 128 else 8}
    others = [rule | {"columns": width, "num_warps": warps} for width in (16, 32, 64) for warps in (2, 4, 8)]
    key = q.shape[-1], v.shape[-1], str(v.dtype)
    return tuned(f"delta_rule {kernel}", key, rule, others, launch)


def _decay(g: Tensor | None) -> int:
    return 0 if g is None else 1 if g.shape[-1] == 1 else 2


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    codes: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final state, states before each chunk: what backward needs; empty unless `keep`)."""
    outputs = empty_outputs(q, k, v, a, b, g, initial, codes, scale, keep)
    batch, time, heads, values = v.shape
    initial = None if initial is None else initial.to(torch.float32)
    tensors = contiguous(q, k, v, a, b, g, initial, codes)
    flags = initial is not None, codes is not None, keep, _decay(g), q.shape[2] // heads, CHUNK

    def launch(sizes: dict[str, int]) -> None:
        grid = batch * heads, triton.cdiv(values, sizes["columns"])
        arguments = *tensors, *outputs, scale, time, heads, q.shape[-1], values, *flags
        forward_kernel[grid](*arguments, sizes["rows"], sizes["columns"], num_warps=sizes["num_warps"])

    with torch.cuda.device_of(v):
        launch(_sizes("forward", q, v, 2048, launch))
    return outputs


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    codes: Tensor | None,
    kept: Tensor,
    do: Tensor,
    dstate: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, b, g (empty without one) and the initial state."""
    dq, dk, dv, da, db, dg, d_initial = empty_gradients(q, k, v, a, b, g, codes, kept, do, dstate, scale)
    batch, time, heads, values = v.shape
    sums = [dq, dk, da, db, dg]
    tensors = contiguous(q, k, v, a, b, g, codes, kept, do, dstate)
    flags = codes is not None, _decay(g), q.shape[2] // heads, CHUNK

    def launch(sizes: dict[str, int]) -> list[Tensor]:
        rows, columns = sizes["rows"], sizes["columns"]
        blocks = triton.cdiv(values, columns)
        parts = sums if blocks == 1 else [x.new_empty(blocks, *x.shape, dtype=torch.float32) for x in sums]
        scratch = kept.new_empty(batch * heads * blocks * CHUNK * rows * columns)
        backward_kernel[(batch * heads, blocks)](
            *(*tensors, scratch, *parts[:2], dv, *parts[2:], d_initial),
            *(scale, batch, time, heads, q.shape[-1], values, *flags, rows, columns),
            num_warps=sizes["num_warps"],
        )
        return parts

    with torch.cuda.device_of(v):
        parts = launch(_sizes("backward", q, v, 4096, launch))
    if parts is not sums:
        dq, dk, da, db, dg = (part.sum(0).to(x.dtype) for part, x in zip(parts, sums, strict=True))
    return dq, dk, dv, da, db, dg, d_initial


forward = differentiable("delta_rule_triton", _forward, _backward, empty_outputs, empty_gradients, "o state kept")
delta_rule = functools.partial(fused, forward)
