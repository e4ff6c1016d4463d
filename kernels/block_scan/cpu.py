"""Block scan in C (`cpu.c`), forward and backward, as custom operators that autograd and torch.compile know."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import function, pointer
from ..operators import contiguous, differentiable, needs_gradient
from ..steps import step_codes


def block_scan(
    *, a: Tensor, x: Tensor, initial_state: Tensor | None, seq_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.block_scan`."""
    output_dtype = x.dtype
    a, x = a.to(torch.float32), x.to(torch.float32)
    initial_state = None if initial_state is None else initial_state.to(torch.float32)
    h, state, _ = forward(a, x, initial_state, step_codes(seq_ids, mask), needs_gradient(a, x, initial_state))
    return h.to(output_dtype), state


def _forward(
    a: Tensor, x: Tensor, initial: Tensor | None, codes: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, final state, the states that the steps read: what backward needs; empty unless `keep`)."""
    h, state, kept = _empty_outputs(a, x, initial, codes, keep)
    inputs = contiguous(a, x, initial, codes)
    function("block_scan", "block_scan_forward", "p" * 7 + "i" * 5)(
        *(pointer(tensor) for tensor in (*inputs, h, state)), pointer(kept) if keep else None, *_sizes(x)
    )
    return h, state, kept


def _backward(
    a: Tensor, codes: Tensor | None, kept: Tensor, dh: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state."""
    gradients = _empty_gradients(a, codes, kept, dh, dstate)
    inputs = contiguous(a, codes, kept, dh, dstate)
    function("block_scan", "block_scan_backward", "p" * 8 + "i" * 5)(
        *(pointer(tensor) for tensor in (*inputs, *gradients)), *_sizes(dh)
    )
    return gradients


def _sizes(x: Tensor) -> tuple[int, ...]:
    return (*x.shape, torch.get_num_threads())


def _empty_outputs(a, x, initial, codes, keep) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, blocks, width = x.shape
    return (
        x.new_empty(x.shape),
        x.new_empty(batch, blocks, width),
        x.new_empty(batch, time if keep else 0, blocks, width),
    )


def _empty_gradients(a, codes, kept, dh, dstate) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), dh.new_empty(dh.shape), dstate.new_empty(dstate.shape)


forward = differentiable("block_scan_cpu", _forward, _backward, _empty_outputs, _empty_gradients, "h state kept")
