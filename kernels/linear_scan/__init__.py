"""Linear scan: an elementwise linear recurrence, real or complex.

    h_t = a_t * h_{t-1} + x_t

B batch, T time, D channels. Used by minGRU, minLSTM, LRU, RG-LRU (Hawk, Griffin), HGRN, GateLoop, S5.
Sources: Blelloch 1990 (scans), Martin and Cundy 2018 (linear recurrences in parallel), LRU (Orvieto et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, native
from ..checks import check_steps, expect, expect_ndim
from ..dispatch import dispatch, dispatch_alike
from ..errors import ShapeError
from ..registration import register_backends
from . import chunked, cpu, reference

__all__ = ["linear_scan", "linear_scan_step"]


def _triton():
    from . import triton_

    return triton_


def _triton_supports(**call) -> str | None:
    return gpu.supports(call, (torch.float32, torch.bfloat16, torch.float16, torch.complex64))


def _cpu_step_supports(*, a, x, state) -> str | None:
    return native.supports_step("linear_scan", {"a": a, "x": x}, state, dtypes=(torch.float32, torch.complex64))


register_backends("linear_scan", "linear_scan", reference, chunked, cpu, _triton, triton_supports=_triton_supports)
register_backends("linear_scan", "linear_scan_step", reference, chunked, cpu, cpu_supports=_cpu_step_supports)


def linear_scan(
    a: Tensor,
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_ids: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The states of h_t = a_t * h_{t-1} + x_t, channel by channel.

    Args:
        a, x: (B, T, D), both real or both complex. a is the factor itself, not its logarithm; any value is allowed.
        initial_state: (B, D); None: zeros.
        seq_ids: (B, T) integers; the state is zeroed where the id differs from the valid step before. The first step
            continues `initial_state`.
        mask: (B, T) booleans; a step with False leaves the state as it was and gives a zero output.
        backend: which implementation; None chooses the fastest (`kernels/dispatch.py`).
    Returns:
        h: (B, T, D) in x's dtype, and the last state, (B, D) in float32 or complex64 (float64, complex128 for inputs of
        that width).
    Raises:
        ShapeError: names the argument, its shape and the expected one.
    """
    expect_ndim("x", x, 3, "(batch, time, channels)")
    batch, time, channels = x.shape
    expect("a", a, (batch, time, channels))
    if a.is_complex() != x.is_complex():
        raise ShapeError(f"a has dtype {a.dtype} and x {x.dtype}; expected both real or both complex.")
    if initial_state is not None:
        expect("initial_state", initial_state, (batch, channels))
    check_steps(seq_ids, mask, batch, time)
    call = {"a": a, "x": x, "initial_state": initial_state, "seq_ids": seq_ids, "mask": mask}
    return dispatch("linear_scan", call, backend)


def linear_scan_step(a: Tensor, x: Tensor, state: Tensor, *, backend: str | None = None) -> Tensor:
    """One step of decoding: `state` becomes a * state + x **in place**.

    Args:
        a, x: (B, D), both real or both complex. Without gradients.
        state: (B, D), float32 or complex64 (float64, complex128).
    Returns:
        h: (B, D) the new state in x's dtype, a tensor of its own.
    """
    if not a.shape == x.shape == state.shape:
        raise ShapeError(f"a has shape {tuple(a.shape)}, x {tuple(x.shape)}, state {tuple(state.shape)}; expected one.")
    alike = (a.dtype, x.dtype, state.dtype, state.device, state.is_contiguous())
    return dispatch_alike("linear_scan_step", {"a": a, "x": x, "state": state}, alike, backend)
