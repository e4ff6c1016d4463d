"""Softmax scan: the average of all values so far, weighted by the exponential of their scores, with optional decay.

    N_t = exp(w) N_{t-1} + exp(k_t) v_t         D_t = exp(w) D_{t-1} + exp(k_t)
    out_t = N_t / D_t                                                              without a bonus
    out_t = (N_{t-1} + exp(u + k_t) v_t) / (D_{t-1} + exp(u + k_t))                with bonus u

k score, v value, w log decay, u bonus; B batch, T time, H heads, V width of the values. So at step t the value of step
i < t has weight exp((t - i) w + k_i) without a bonus, and with one exp((t - 1 - i) w + k_i); its own has exp(u + k_t).

The state is (m, n, d) with N = n exp(m), D = d exp(m), and m the largest decayed score: m_t = max(m_{t-1} + w, k_t).
Exponentials are only taken of differences to such a maximum, so no score is too large.

Used by Aaren (one score a head, no decay, no bonus), RWKV-4 (scores, decay and bonus per channel).
Sources: Milakov and Gimelshein 2018 (online softmax), RWKV (Peng et al. 2023, section 3), "Attention as an RNN" (Feng
et al. 2024, section 3).
"""

from __future__ import annotations

from torch import Tensor

from .. import gpu, native
from ..checks import check_steps, expect, expect_ndim
from ..dispatch import dispatch, dispatch_alike
from ..errors import ShapeError
from ..registration import register_backends
from . import chunked, cpu, reference
from .state import SoftmaxState

__all__ = ["SoftmaxState", "softmax_scan", "softmax_scan_step"]


def _triton():
    from . import triton_

    return triton_


def _triton_supports(**call) -> str | None:
    if call["k"].shape[3] == 1 and call["v"].shape[3] > 1024:
        return "v is wider than 1024 with one score a head"
    return gpu.supports(call)


def _cpu_step_supports(*, k, v, state, decay, bonus) -> str | None:
    return native.supports_step("softmax_scan", {"k": k, "v": v, "decay": decay, "bonus": bonus}, *state)


register_backends("softmax_scan", "softmax_scan", reference, chunked, cpu, _triton, triton_supports=_triton_supports)
register_backends("softmax_scan", "softmax_scan_step", reference, chunked, cpu, cpu_supports=_cpu_step_supports)


def softmax_scan(
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    initial_state: SoftmaxState | None = None,
    seq_ids: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """The weighted averages of the equations above.

    Args:
        k: scores (natural logarithms of weights), (B, T, H, 1) one a head or (B, T, H, V) one a channel. Any size; -inf
            gives no weight.
        v: (B, T, H, V).
        decay: log decay a step, <= 0, finite: (H, 1) or (H, V), as k's last axis; None: no decay.
        bonus: (H, 1) or (H, V), as k's last axis: added to a step's own score where the step itself reads it, and not
            to the score that the state keeps; the steps before are then one step less decayed (RWKV-4's time_first).
            None: the state after the step is read.
        initial_state: (maximum (B, H, 1|V), numerator (B, H, V), denominator (B, H, 1|V)), as this function returns it;
            None: (-inf, 0, 0).
        seq_ids: (B, T) integers; the state is emptied where the id differs from the valid step before. The first step
            continues `initial_state`.
        mask: (B, T) booleans; False: the step is as if it were not there (no decay either), and its output is zero.
        backend: which implementation; None chooses the fastest (`kernels/dispatch.py`).
    Returns:
        out: (B, T, H, V) in v's dtype; zero where no step has any weight. And the state after the last step, a
        SoftmaxState in float32 (float64 for values in float64).

        Gradients are those of these functions, the state's three tensors included. A state stands for the pair (N, D),
        so the gradient of the initial maximum is numerator * dnumerator + denominator * ddenominator. What the final
        maximum's gradient has beyond the same expression (nothing, if the final state is used as such a pair) goes to
        the score that is the maximum, or to the initial maximum, and to the decay since.
    Raises:
        ShapeError: names the argument, its shape and the expected one.
    """
    expect_ndim("v", v, 4, "(batch, time, heads, width)")
    batch, time, heads, width = v.shape
    expect("k", k, (batch, time, heads, width), (batch, time, heads, 1))
    scores = k.shape[3]
    for name, tensor in (("decay", decay), ("bonus", bonus)):
        if tensor is not None:
            expect(name, tensor, (heads, scores))
    if initial_state is not None:
        widths = (scores, width, scores)
        for name, tensor, last in zip(SoftmaxState._fields, initial_state, widths, strict=True):
            expect(f"initial_state's {name}", tensor, (batch, heads, last))
    check_steps(seq_ids, mask, batch, time)
    call = {"k": k, "v": v, "decay": decay, "bonus": bonus, "initial_state": initial_state}
    return dispatch("softmax_scan", call | {"seq_ids": seq_ids, "mask": mask}, backend)


def softmax_scan_step(
    k: Tensor,
    v: Tensor,
    state: SoftmaxState,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of decoding: the three tensors of `state` are overwritten by the state after the step.

    Args:
        k: (B, H, 1) or (B, H, V). v: (B, H, V). Without gradients.
        state: as of `softmax_scan`. decay, bonus: likewise.
    Returns:
        out: (B, H, V) in v's dtype.
    Raises:
        ShapeError: where the shapes do not fit together.
    """
    maximum, numerator, denominator = state
    shape, scores = v.shape, k.shape
    fit = shape == numerator.shape and scores == maximum.shape and scores == denominator.shape
    if not (fit and len(shape) == 3 and (scores == shape or scores == (*shape[:2], 1))):
        shapes = ", ".join(str(tuple(x.shape)) for x in state)
        raise ShapeError(f"k has shape {tuple(scores)}, v {tuple(shape)}, the state {shapes}; they do not fit.")
    for name, tensor in (("decay", decay), ("bonus", bonus)):
        if tensor is not None and tensor.shape != scores[1:]:
            expect(name, tensor, tuple(scores[1:]))
    call = {"k": k, "v": v, "state": state, "decay": decay, "bonus": bonus}
    alike = (
        *(k.dtype, v.dtype, decay is None or decay.dtype, bonus is None or bonus.dtype),
        *(maximum.dtype, maximum.is_contiguous(), maximum.device, numerator.dtype, numerator.is_contiguous()),
        *(denominator.dtype, denominator.is_contiguous()),
    )
    return dispatch_alike("softmax_scan_step", call, alike, backend)
