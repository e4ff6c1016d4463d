"""Selective scan in C (`cpu.c`), forward and backward, as custom operators that autograd and torch.compile know."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from ..native import function, pointer
from ..operators import contiguous, differentiable, needs_gradient
from ..steps import step_codes
from .operators import empty_gradients

CHUNK, TILE, LANES = 32, 4, 16  # as in cpu.c


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
    output_dtype = x.dtype
    if not x.dtype == dt.dtype == b.dtype == c.dtype:
        x, dt, b, c = (tensor.to(torch.float32) for tensor in (x, dt, b, c))
    a = a.to(torch.float32)
    d, initial_state = (None if tensor is None else tensor.to(torch.float32) for tensor in (d, initial_state))
    inputs = (x, dt, a, b, c, d, initial_state)
    y, state, _ = forward(*inputs, step_codes(seq_ids, mask), needs_gradient(*inputs))
    return y.to(output_dtype), state


def _forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial: Tensor | None,
    codes: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, states before each chunk: what backward needs; empty unless `keep`)."""
    y, state, kept = _empty_outputs(x, dt, a, b, c, d, initial, codes, keep)
    inputs = contiguous(x, dt, a, b, c, d, initial, codes)
    function("selective_scan", "selective_scan_forward", "p" * 11 + "i" * 6)(
        *(pointer(tensor) for tensor in (*inputs, y, state)), pointer(kept) if keep else None, *_numbers(x, a)
    )
    return y, state, kept


def _empty_outputs(x, dt, a, b, c, d, initial, codes, keep):
    batch, time, channels = x.shape
    states = a.shape[1]
    chunks = -(-time // CHUNK) if keep else 0
    lanes = -(-channels // LANES) * LANES * (-(-states // TILE) * TILE)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(batch, channels, states, dtype=torch.float32),
        x.new_empty(batch, chunks, lanes, dtype=torch.float32),
    )


def _backward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    codes: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, d (empty without one) and the initial state."""
    dx, ddt, da, db, dc, dd, dinitial = empty_gradients(x, dt, a, b, c, d, codes, kept, dy, dstate)
    inputs = contiguous(x, dt, a, b, c, d, codes, kept, dy, dstate)
    function("selective_scan", "selective_scan_backward", "p" * 17 + "i" * 6)(
        *(pointer(tensor) for tensor in (*inputs, dx, ddt, da, db, dc)),
        None if d is None else pointer(dd),
        pointer(dinitial),
        *_numbers(x, a),
    )
    return dx, ddt, da, db, dc, dd, dinitial


forward = differentiable("selective_scan_cpu", _forward, _backward, _empty_outputs, empty_gradients, "y state kept")


def _numbers(x: Tensor, a: Tensor) -> tuple[int, ...]:
    """The integer arguments of the C functions."""
    return *x.shape, a.shape[1], torch.get_num_threads(), int(x.dtype == torch.bfloat16)


@functools.cache
def _step() -> Callable[..., None]:
    return function("selective_scan", "selective_scan_step", "p")


_PACK_STEP = struct.Struct("13q").pack  # the structure Step of cpu.c


def selective_scan_step(
    *, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor
) -> Tensor:
    """See `kernels.selective_scan_step`. A plain call: a custom operator would cost more than the work."""
    dtype = x.dtype
    if not (dt.dtype == b.dtype == c.dtype == dtype):
        x, dt, b, c = x.float(), dt.float(), b.float(), c.float()
    x, dt, a, b, c = x.contiguous(), dt.contiguous(), a.float().contiguous(), b.contiguous(), c.contiguous()
    if d is not None:
        d = d.float().contiguous()
    y = torch.empty_like(x)
    _step()(
        _PACK_STEP(
            *(x.data_ptr(), dt.data_ptr(), a.data_ptr(), b.data_ptr(), c.data_ptr(), 0 if d is None else d.data_ptr()),
            *(state.data_ptr(), y.data_ptr(), *state.shape, torch.get_num_threads(), x.dtype == torch.bfloat16),
        )
    )
    return y if y.dtype == dtype else y.to(dtype)
