"""Long convolution: a linear state space per channel that does not change over time.

    h_t = A h_{t-1} + b u_t            h in C^N or R^N, per channel
    y_t = Re(c h_t) + d u_t

which is y = k * u with the kernel k_t = Re(c A^t b), as long as the sequence, and d added to k_0. A is diagonal, dense,
or diagonal plus low rank:

    A h = a * h                        a (D, N)
    A h = a h                          a (D, N, N)
    A h = a * h + p Re(q h)            a (D, N), p (D, N, R), q (D, R, N)

The last is linear over the reals only. With p = -2 P and q = conj(P), it is diag(a) - P P^* on states that come in
conjugate pairs of which one half is kept, and 2 Re(c h) is then written with a doubled c.

B batch, T time, D channels, N state size, M outputs of a channel, R rank. Used by S4, S4D, LSSL.
Sources: LSSL (Gu et al. 2021, arXiv 2110.13985), S4 (Gu, Goel, Re 2021, arXiv 2111.00396), S4D (Gu et al. 2022,
arXiv 2206.11893).
"""

from __future__ import annotations

from torch import Tensor

from ..checks import check_steps, expect, expect_ndim
from ..dispatch import dispatch
from ..errors import ShapeError
from ..registration import register_backends
from . import chunked, reference

__all__ = ["long_conv", "long_conv_step"]

register_backends("long_conv", "long_conv", reference, chunked)
register_backends("long_conv", "long_conv_step", reference, chunked)


def long_conv(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    p: Tensor | None = None,
    q: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_ids: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The outputs of the state space at the head of this file.

    Args:
        u: (B, T, D), real.
        a: (D, N) a diagonal, or (D, N, N). Discretised: the factor of one step. Stable: powers up to T are taken.
        b: (D, N). c: (D, N), or (D, M, N) for M outputs of every channel. a, b and c are real or complex.
        d: (D,), or (D, M); None: zeros.
        p, q: (D, N, R) and (D, R, N), a low-rank part beside a diagonal `a`; None: none.
        initial_state: (B, D, N); None: zeros.
        seq_ids: (B, T) integers; the state is zeroed where the id differs from the valid step before. The first step
            continues `initial_state`.
        mask: (B, T) booleans; a step with False leaves the state as it was and gives a zero output.
        backend: which implementation; None chooses the fastest (`kernels/dispatch.py`).
    Returns:
        y: (B, T, D) or (B, T, D, M) in u's dtype, and the last state, (B, D, N) in float32 (float64 for float64 u), or
        in the complex dtype of that width where a, b or c is complex.
    Raises:
        ShapeError: names the argument, its shape and the expected one.
    """
    expect_ndim("u", u, 3, "(batch, time, channels)")
    batch, time, channels = u.shape
    _check_system(channels, a, b, c, d, p, q)
    if initial_state is not None:
        expect("initial_state", initial_state, (batch, channels, b.shape[-1]))
    check_steps(seq_ids, mask, batch, time)
    system = {"a": a, "b": b, "c": c, "d": d, "p": p, "q": q}
    call = {"u": u, **system, "initial_state": initial_state, "seq_ids": seq_ids, "mask": mask}
    return dispatch("long_conv", call, backend)


def long_conv_step(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    state: Tensor,
    *,
    p: Tensor | None = None,
    q: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of decoding: `state` becomes A state + b u **in place**.

    Args:
        u: (B, D). Without gradients. a, b, c, d, p, q: as for `long_conv`.
        state: (B, D, N), as `long_conv` returns it.
    Returns:
        y: (B, D) or (B, D, M) in u's dtype.
    """
    if u.ndim != 2:
        raise ShapeError(f"u has shape {tuple(u.shape)}; expected (batch, channels).")
    _check_system(u.shape[1], a, b, c, d, p, q)
    expect("state", state, (*u.shape, b.shape[-1]))
    call = {"u": u, "a": a, "b": b, "c": c, "d": d, "p": p, "q": q, "state": state}
    return dispatch("long_conv_step", call, backend)


def _check_system(channels: int, a: Tensor, b: Tensor, c: Tensor, d, p: Tensor | None, q: Tensor | None) -> None:
    """Raises a ShapeError unless the matrices fit each other."""
    size = b.shape[-1]
    expect("b", b, (channels, size))
    expect("a", a, (channels, size), (channels, size, size))
    outputs = c.shape[1:-1]
    expect("c", c, (channels, size), *([(channels, *outputs, size)] if len(outputs) == 1 else []))
    if d is not None:
        expect("d", d, (channels, *outputs))
    if (p is None) != (q is None) or (p is not None and a.ndim == 3):
        raise ShapeError("p and q come together, beside a diagonal a of shape (channels, state size).")
    if p is not None and q is not None:
        expect("p", p, (channels, size, p.shape[-1]))
        expect("q", q, (channels, p.shape[-1], size))
