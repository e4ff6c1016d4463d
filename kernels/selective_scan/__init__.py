"""Selective scan: a diagonal state space model whose step width, input and output maps depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        h in R^{D x N}
    y_t = h_t C_t + D x_t

B batch, T time, D channels, N state numbers a channel. Used by Mamba.
Source: Gu and Dao 2023, "Mamba", section 3 and algorithm 2.
"""

from __future__ import annotations

from torch import Tensor

from .. import native
from ..checks import check_steps, expect, expect_ndim
from ..dispatch import dispatch, dispatch_alike
from ..errors import ShapeError
from ..registration import register_backends
from . import chunked, cpu, reference

__all__ = ["selective_scan", "selective_scan_step"]


def _triton():
    from . import triton_

    return triton_


def _cpu_step_supports(*, x, dt, a, b, c, d, state) -> str | None:
    return native.supports_step("selective_scan", {"x": x}, state)


register_backends("selective_scan", "selective_scan", reference, chunked, cpu, _triton)
register_backends("selective_scan", "selective_scan_step", reference, chunked, cpu, cpu_supports=_cpu_step_supports)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_ids: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The outputs of h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = h_t C_t + D x_t, and the last state.

    Args:
        x: (B, T, D).
        dt: (B, T, D), step widths, positive: the softplus was taken before.
        a: (D, N), real, normally negative: the decay of a step is exp(dt * a).
        b, c: (B, T, N), shared by all channels.
        d: (D,), what of x goes straight to the output; None: nothing.
        initial_state: (B, D, N); None: zeros.
        seq_ids: (B, T) integers; the state is zeroed where the id differs from the valid step before. The first step
            continues `initial_state`.
        mask: (B, T) booleans; a step with False leaves the state as it was and gives a zero output.
        backend: which implementation; None chooses the fastest (`kernels/dispatch.py`).
    Returns:
        y: (B, T, D) in x's dtype, and the last state, (B, D, N) in float32 (float64 for float64 inputs).
    Raises:
        ShapeError: names the argument, its shape and the expected one.
    """
    expect_ndim("x", x, 3, "(batch, time, channels)")
    batch, time, channels = x.shape
    expect("dt", dt, (batch, time, channels))
    if not isinstance(a, Tensor) or a.ndim != 2 or a.shape[0] != channels or a.is_complex():
        got = f"has shape {tuple(a.shape)} and dtype {a.dtype}" if isinstance(a, Tensor) else f"is a {type(a).__name__}"
        raise ShapeError(f"a {got}; expected real numbers of shape ({channels}, states).")
    states = a.shape[1]
    expect("b", b, (batch, time, states))
    expect("c", c, (batch, time, states))
    if d is not None:
        expect("d", d, (channels,))
    if initial_state is not None:
        expect("initial_state", initial_state, (batch, channels, states))
    check_steps(seq_ids, mask, batch, time)
    call = {"x": x, "dt": dt, "a": a, "b": b, "c": c, "d": d}
    call |= {"initial_state": initial_state, "seq_ids": seq_ids, "mask": mask}
    return dispatch("selective_scan", call, backend)


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    state: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of decoding, without gradients: `state` (B, D, N), float32, is replaced **in place** by the next one.

    Args:
        x, dt: (B, D). a: (D, N). b, c: (B, N). d: (D,) or None.
    Returns:
        y: (B, D) in x's dtype.
    """
    if not (
        state.ndim == 3
        and x.shape == dt.shape == state.shape[:2]
        and a.shape == state.shape[1:]
        and b.shape == c.shape == state.shape[::2]
        and (d is None or d.shape == x.shape[1:])
    ):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, dt, a, b, c, state))
        raise ShapeError(
            f"x, dt, a, b, c, state have shapes {shapes}; expected (B, D), (B, D), (D, N), (B, N), (B, N), (B, D, N)."
        )
    call = {"x": x, "dt": dt, "a": a, "b": b, "c": c, "d": d, "state": state}
    alike = (x.dtype, dt.dtype, a.dtype, b.dtype, c.dtype, state.dtype, state.device, state.is_contiguous())
    return dispatch_alike("selective_scan_step", call, alike, backend)
