"""Block scan: a linear recurrence whose transition at every step is a matrix of its own, block by block.

    h_t = A_t h_{t-1} + x_t        h in R^N per block, A in R^{N x N}

B batch, T time, H blocks, N width of a block. Used by the block-diagonal input-dependent linear RNN; with rotations or
permutations as A_t it follows any finite automaton, which no diagonal recurrence can.
Sources: Blelloch 1990 (scans of any associative operation), Fan, Chi and Rudnicky 2023, "Advancing Regular Language
Reasoning in Linear Recurrent Neural Networks", figure 1.
"""

from __future__ import annotations

from torch import Tensor

from ..checks import check_steps, expect, expect_ndim
from ..dispatch import dispatch
from ..errors import ShapeError
from ..registration import register_backends
from . import chunked, cpu, reference

__all__ = ["block_scan", "block_scan_step"]

register_backends("block_scan", "block_scan", reference, chunked, cpu)
register_backends("block_scan", "block_scan_step", reference, chunked)


def block_scan(
    a: Tensor,
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_ids: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The states of h_t = A_t h_{t-1} + x_t, block by block.

    Args:
        a: (B, T, H, N, N), real; any values, but products of all steps must stay within the range of floats.
        x: (B, T, H, N).
        initial_state: (B, H, N); None: zeros.
        seq_ids: (B, T) integers; the state is zeroed where the id differs from the valid step before. The first step
            continues `initial_state`.
        mask: (B, T) booleans; a step with False leaves the state as it was and gives a zero output.
        backend: which implementation; None chooses the fastest (`kernels/dispatch.py`).
    Returns:
        h: (B, T, H, N) in x's dtype, and the last state, (B, H, N) in float32 (float64 for float64 inputs).
    Raises:
        ShapeError: names the argument, its shape and the expected one.
    """
    expect_ndim("x", x, 4, "(batch, time, blocks, width)")
    batch, time, blocks, width = x.shape
    expect("a", a, (batch, time, blocks, width, width))
    if a.is_complex() or x.is_complex():
        raise ShapeError(f"a has dtype {a.dtype} and x {x.dtype}; expected real numbers.")
    if initial_state is not None:
        expect("initial_state", initial_state, (batch, blocks, width))
    check_steps(seq_ids, mask, batch, time)
    call = {"a": a, "x": x, "initial_state": initial_state, "seq_ids": seq_ids, "mask": mask}
    return dispatch("block_scan", call, backend)


def block_scan_step(a: Tensor, x: Tensor, state: Tensor, *, backend: str | None = None) -> Tensor:
    """One step of decoding: `state` becomes A state + x **in place**.

    Args:
        a: (B, H, N, N). x: (B, H, N). Without gradients.
        state: (B, H, N), float32 (float64).
    Returns:
        h: (B, H, N) the new state in x's dtype, a tensor of its own.
    """
    if not a.shape == (*x.shape, x.shape[-1]) or x.shape != state.shape:
        raise ShapeError(
            f"a has shape {tuple(a.shape)}, x {tuple(x.shape)}, state {tuple(state.shape)}; expected (B, H, N, N), "
            "(B, H, N), (B, H, N)."
        )
    return dispatch("block_scan_step", {"a": a, "x": x, "state": state}, backend)
