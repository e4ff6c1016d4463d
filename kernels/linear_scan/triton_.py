"""Linear scan on GPUs, in Triton: a program is a batch row and a block of channels, and keeps its state in registers.

Backward goes through time in chunks, last first; it makes the states of a chunk again from the state before it, which
forward kept, into a scratch of one chunk for each program. Complex numbers are pairs of float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import tuned
from ..operators import differentiable, needs_gradient
from ..steps import step_codes
from .operators import CHUNK, empty_gradients, empty_outputs


@triton.jit
def load_step(a, x, codes, row, D, d, COMPLEX: tl.constexpr, HAS_CODES: tl.constexpr):
    """Factor and input of one step, (1, 0) where it is skipped, and its code; `row` is b * T + t."""
    code = tl.zeros(d.shape, tl.int32)
    if HAS_CODES:
        code += tl.load(codes + row).to(tl.int32)
    read = (d < D) & (code != 2)
    if COMPLEX:
        at = (row * D + d) * 2
        a_im, x_im = tl.load(a + at + 1, mask=read, other=0.0), tl.load(x + at + 1, mask=read, other=0.0)
    else:
        at = row * D + d
        a_im = tl.zeros(d.shape, tl.float32)
        x_im = tl.zeros(d.shape, tl.float32)
    a_re = tl.load(a + at, mask=read, other=0.0).to(tl.float32)
    x_re = tl.load(x + at, mask=read, other=0.0).to(tl.float32)
    return tl.where(code == 2, 1.0, a_re), a_im, x_re, x_im, code


@triton.jit
def load_pair(tensor, row, D, d, read, COMPLEX: tl.constexpr):
    """(re, im) of row `row` of (rows, D); zeros where `read` is False."""
    if COMPLEX:
        at = (row * D + d) * 2
        re, im = tl.load(tensor + at, mask=read, other=0.0), tl.load(tensor + at + 1, mask=read, other=0.0)
    else:
        re = tl.load(tensor + row * D + d, mask=read, other=0.0).to(tl.float32)
        im = tl.zeros_like(re)
    return re, im


@triton.jit
def store_pair(tensor, row, D, d, re, im, COMPLEX: tl.constexpr):
    if COMPLEX:
        at = (row * D + d) * 2
        tl.store(tensor + at, re, mask=d < D)
        tl.store(tensor + at + 1, im, mask=d < D)
    else:
        tl.store(tensor + row * D + d, re.to(tensor.dtype.element_ty), mask=d < D)


@triton.jit
def advance(re, im, a_re, a_im, x_re, x_im, code, COMPLEX: tl.constexpr):
    """The state after a step."""
    re, im = tl.where(code == 1, 0.0, re), tl.where(code == 1, 0.0, im)
    if COMPLEX:
        return a_re * re - a_im * im + x_re, a_re * im + a_im * re + x_im
    else:
        return a_re * re + x_re, im


@triton.jit
def forward_kernel(
    a, x, initial, codes, h, final, kept, T, D,
    HAS_INITIAL: tl.constexpr, HAS_CODES: tl.constexpr, KEEP: tl.constexpr,
    COMPLEX: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    re = tl.zeros([BLOCK], tl.float32)
    im = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        re, im = load_pair(initial, b, D, d, d < D, COMPLEX)
    chunks = tl.cdiv(T, CHUNK)
    for chunk in range(chunks):
        if KEEP:
            store_pair(kept, b * chunks + chunk, D, d, re, im, COMPLEX)
        for t in tl.range(chunk * CHUNK, tl.minimum(T, chunk * CHUNK + CHUNK), num_stages=4):  # pyright: ignore
            row = b * T + t
            a_re, a_im, x_re, x_im, code = load_step(a, x, codes, row, D, d, COMPLEX, HAS_CODES)
            re, im = advance(re, im, a_re, a_im, x_re, x_im, code, COMPLEX)
            store_pair(h, row, D, d, tl.where(code == 2, 0.0, re), tl.where(code == 2, 0.0, im), COMPLEX)
    store_pair(final, b, D, d, re, im, COMPLEX)


@triton.jit
def backward_kernel(
    a, x, codes, kept, dh, dfinal, scratch, da, dx, dinitial, T, D,
    HAS_CODES: tl.constexpr, COMPLEX: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    # This program's own CHUNK rows of states, each before its step.
    states = (b * tl.num_programs(1) + tl.program_id(1)) * CHUNK
    lane = tl.arange(0, BLOCK)
    g_re, g_im = load_pair(dfinal, b, D, d, inside, COMPLEX)
    chunks = tl.cdiv(T, CHUNK)
    for back in range(chunks):
        chunk = chunks - 1 - back
        start = chunk * CHUNK
        steps = tl.minimum(T - start, CHUNK)
        re, im = load_pair(kept, b * chunks + chunk, D, d, inside, COMPLEX)
        for i in range(steps):
            a_re, a_im, x_re, x_im, code = load_step(a, x, codes, b * T + start + i, D, d, COMPLEX, HAS_CODES)
            before_re, before_im = tl.where(code == 1, 0.0, re), tl.where(code == 1, 0.0, im)
            store_pair(scratch, states + i, BLOCK, lane, before_re, before_im, COMPLEX)
            re, im = advance(re, im, a_re, a_im, x_re, x_im, code, COMPLEX)
        tl.debug_barrier()  # other threads of the program may read what this one wrote
        for j in range(steps):
            i = steps - 1 - j
            row = b * T + start + i
            a_re, a_im, x_re, x_im, code = load_step(a, x, codes, row, D, d, COMPLEX, HAS_CODES)
            d_re, d_im = load_pair(dh, row, D, d, inside & (code != 2), COMPLEX)
            h_re, h_im = load_pair(scratch, states + i, BLOCK, lane, lane < BLOCK, COMPLEX)
            s_re, s_im = g_re + d_re, g_im + d_im
            a_gradient, a_gradient_im = s_re * h_re, s_im
            g_re = s_re * a_re
            if COMPLEX:
                a_gradient, a_gradient_im = s_re * h_re + s_im * h_im, s_im * h_re - s_re * h_im
                g_re, g_im = g_re + s_im * a_im, s_im * a_re - s_re * a_im
            store_pair(dx, row, D, d, tl.where(code == 2, 0.0, s_re), tl.where(code == 2, 0.0, s_im), COMPLEX)
            a_gradient, a_gradient_im = tl.where(code == 2, 0.0, a_gradient), tl.where(code == 2, 0.0, a_gradient_im)
            store_pair(da, row, D, d, a_gradient, a_gradient_im, COMPLEX)
            g_re, g_im = tl.where(code == 1, 0.0, g_re), tl.where(code == 1, 0.0, g_im)
        tl.debug_barrier()
    store_pair(dinitial, b, D, d, g_re, g_im, COMPLEX)


def linear_scan(
    *, a: Tensor, x: Tensor, initial_state: Tensor | None, seq_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.linear_scan`."""
    needed = needs_gradient(a, x, initial_state)
    h, state, _ = forward(a, x, initial_state, step_codes(seq_ids, mask), needed)
    return h, state


CANDIDATES = [{"block": block, "num_warps": warps} for block, warps in ((32, 1), (128, 1), (128, 2), (256, 4))]


def _sizes(kernel: str, x: Tensor, launch: Callable[[dict[str, int]], None]) -> dict[str, int]:
    """Channels a program and warps; by rule enough programs to fill a GPU, of one warp."""
    channels = x.shape[2]
    rule = {"block": min(64, max(32, triton.next_power_of_2(channels))), "num_warps": 1}
    return tuned(f"linear_scan {kernel}", (channels, str(x.dtype)), rule, CANDIDATES, launch)


def _real(x: Tensor | None) -> Tensor | None:
    """Contiguous, complex numbers as pairs."""
    if x is None:
        return None
    x = x.contiguous()
    return torch.view_as_real(x) if x.is_complex() else x


def _forward(
    a: Tensor, x: Tensor, initial: Tensor | None, codes: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, final state, states before each chunk: what backward needs; empty unless `keep`)."""
    h, state, kept = empty_outputs(a, x, initial, codes, keep)
    batch, time, channels = x.shape
    initial = None if initial is None else initial.to(state.dtype)
    tensors = [_real(tensor) for tensor in (a, x, initial, codes, h, state, kept)]
    flags = initial is not None, codes is not None, keep, x.is_complex(), CHUNK

    def launch(sizes: dict[str, int]) -> None:
        grid = batch, triton.cdiv(channels, sizes["block"])
        forward_kernel[grid](*tensors, time, channels, *flags, sizes["block"], num_warps=sizes["num_warps"])

    with torch.cuda.device_of(x):
        launch(_sizes("forward", x, launch))
    return h, state, kept


def _backward(
    a: Tensor, x: Tensor, codes: Tensor | None, kept: Tensor, dh: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state."""
    da, dx, dinitial = empty_gradients(a, x, codes, kept, dh, dstate)
    batch, time, channels = x.shape
    tensors = [_real(tensor) for tensor in (a, x, codes, kept, dh, dstate)]
    gradients = [_real(tensor) for tensor in (da, dx, dinitial)]

    def launch(sizes: dict[str, int]) -> None:
        block, blocks = sizes["block"], triton.cdiv(channels, sizes["block"])
        scratch = _real(kept.new_empty(batch * blocks * CHUNK * block))
        flags = codes is not None, x.is_complex(), CHUNK, block
        arguments = *tensors, scratch, *gradients, time, channels, *flags
        backward_kernel[(batch, blocks)](*arguments, num_warps=sizes["num_warps"])

    with torch.cuda.device_of(x):
        launch(_sizes("backward", x, launch))
    return da, dx, dinitial


forward = differentiable("linear_scan_triton", _forward, _backward, empty_outputs, empty_gradients, "h state kept")
