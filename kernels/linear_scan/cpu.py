"""Linear scan in C (`cpu.c`), forward and backward, as custom operators that autograd and torch.compile know."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..native import function, pointer
from ..operators import differentiable, needs_gradient
from ..steps import step_codes
from .operators import empty_gradients, empty_outputs


def linear_scan(
    *, a: Tensor, x: Tensor, initial_state: Tensor | None, seq_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.linear_scan`."""
    output_dtype = x.dtype
    if a.dtype != x.dtype:
        a, x = a.to(torch.float32), x.to(torch.float32)
    needed = needs_gradient(a, x, initial_state)
    h, state, _ = forward(a, x, initial_state, step_codes(seq_ids, mask), needed)
    return h.to(output_dtype), state


def _forward(
    a: Tensor, x: Tensor, initial: Tensor | None, codes: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, final state, states before each chunk: what backward needs; empty unless `keep`)."""
    h, state, kept = empty_outputs(a, x, initial, codes, keep)
    a, x = a.contiguous(), x.contiguous()
    initial = None if initial is None else initial.to(state.dtype).contiguous()
    width, kind = _numbers(x)
    function("linear_scan", "linear_scan_forward", "pppppppiiiiii")(
        *(pointer(tensor) for tensor in (a, x, initial, codes, h, state)),
        pointer(kept) if keep else None,
        *(x.shape[0], x.shape[1], width, torch.get_num_threads(), *kind),
    )
    return h, state, kept


def _backward(
    a: Tensor, x: Tensor, codes: Tensor | None, kept: Tensor, dh: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state."""
    da, dx, dinitial = empty_gradients(a, x, codes, kept, dh, dstate)
    a, x, dh, dstate = a.contiguous(), x.contiguous(), dh.contiguous(), dstate.contiguous()
    width, kind = _numbers(x)
    function("linear_scan", "linear_scan_backward", "pppppppppiiiiii")(
        *(pointer(tensor) for tensor in (a, x, codes, kept, dh, dstate, da, dx, dinitial)),
        *(x.shape[0], x.shape[1], width, torch.get_num_threads(), *kind),
    )
    return da, dx, dinitial


def _numbers(x: Tensor) -> tuple[int, tuple[int, int]]:
    """Floats a step, and the flags (complex, bfloat16)."""
    return x.shape[2] * (2 if x.is_complex() else 1), (int(x.is_complex()), int(x.dtype == torch.bfloat16))


forward = differentiable("linear_scan_cpu", _forward, _backward, empty_outputs, empty_gradients, "h state kept")


@functools.cache
def _step() -> Callable[..., None]:
    return function("linear_scan", "linear_scan_step", "ppppiiii")


def linear_scan_step(*, a: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """See `kernels.linear_scan_step`. No custom operator: a call's overhead would be several times its work."""
    dtype = x.dtype
    if a.dtype != dtype or not (a.is_contiguous() and x.is_contiguous()):
        a, x = a.to(state.dtype).contiguous(), x.to(state.dtype).contiguous()
    h = torch.empty_like(x)
    floats = state.numel() * (2 if state.is_complex() else 1)
    _step()(
        *(a.data_ptr(), x.data_ptr(), state.data_ptr(), h.data_ptr(), floats, torch.get_num_threads()),
        *(state.is_complex(), x.dtype == torch.bfloat16),
    )
    return h if h.dtype == dtype else h.to(dtype)
