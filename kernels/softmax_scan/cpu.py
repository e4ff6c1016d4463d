"""Softmax scan in C (`cpu.c`), forward and backward, as custom operators that autograd and torch.compile know."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from ..native import function, pointer
from ..operators import contiguous, differentiable, needs_gradient
from ..steps import step_codes
from .operators import empty_gradients, empty_outputs
from .state import SoftmaxState


def softmax_scan(
    *,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    initial_state: SoftmaxState | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, SoftmaxState]:
    """See `kernels.softmax_scan`."""
    output_dtype = v.dtype
    if k.dtype != v.dtype:
        k, v = k.to(torch.float32), v.to(torch.float32)
    decay, bonus = (None if x is None else x.to(torch.float32) for x in (decay, bonus))
    state = (None, None, None) if initial_state is None else tuple(x.to(torch.float32) for x in initial_state)
    tensors = (k, v, decay, bonus, *state)
    needed = needs_gradient(*tensors)
    out, *final, _ = forward(*tensors, step_codes(seq_ids, mask), needed)
    return out.to(output_dtype), SoftmaxState(*final)


def _forward(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    maximum: Tensor | None,
    numerator: Tensor | None,
    denominator: Tensor | None,
    codes: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, the final state's three tensors, states before each chunk: what backward needs; empty unless `keep`)."""
    outputs = empty_outputs(k, v, decay, bonus, maximum, numerator, denominator, codes, keep)
    inputs = contiguous(k, v, decay, bonus, maximum, numerator, denominator, codes)
    function("softmax_scan", "softmax_scan_forward", "p" * 13 + "i" * 6)(
        *(pointer(x) for x in (*inputs, *outputs[:4])), pointer(outputs[4]) if keep else None, *_sizes(k, v)
    )
    return outputs


def _backward(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    codes: Tensor | None,
    kept: Tensor,
    dout: Tensor,
    dmaximum: Tensor,
    dnumerator: Tensor,
    ddenominator: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, decay, bonus and the initial state's three tensors."""
    gradients = empty_gradients(k, v, decay, bonus, codes, kept, dout, dmaximum, dnumerator, ddenominator)
    inputs = contiguous(k, v, decay, bonus, codes, kept, dout, dmaximum, dnumerator, ddenominator)
    function("softmax_scan", "softmax_scan_backward", "p" * 17 + "i" * 6)(
        *(pointer(x) for x in (*inputs, *gradients)), *_sizes(k, v)
    )
    return gradients


def _sizes(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Batch, time, scores a step, values a score, threads, whether bfloat16."""
    batch, time, heads, scores = k.shape
    return batch, time, heads * scores, v.shape[3] // scores, torch.get_num_threads(), int(v.dtype == torch.bfloat16)


forward = differentiable(
    "softmax_scan_cpu", _forward, _backward, empty_outputs, empty_gradients, "out maximum numerator denominator kept"
)


@functools.cache
def _step() -> Callable[..., None]:
    return function("softmax_scan", "softmax_scan_step", "p")


_PACK_STEP = struct.Struct("13q").pack  # the structure Step of cpu.c


def softmax_scan_step(
    *, k: Tensor, v: Tensor, state: SoftmaxState, decay: Tensor | None, bonus: Tensor | None
) -> Tensor:
    """See `kernels.softmax_scan_step`. A plain call: a custom operator would cost more than the work."""
    dtype = v.dtype
    if k.dtype != dtype:
        k, v = k.float(), v.float()
    k, v = k.contiguous(), v.contiguous()
    if decay is not None:
        decay = decay.float().contiguous()
    if bonus is not None:
        bonus = bonus.float().contiguous()
    maximum, numerator, denominator = state
    out = torch.empty_like(v)
    batch, heads, scores = k.shape
    _step()(
        _PACK_STEP(
            *(k.data_ptr(), v.data_ptr(), 0 if decay is None else decay.data_ptr()),
            *(0 if bonus is None else bonus.data_ptr(), maximum.data_ptr(), numerator.data_ptr()),
            *(denominator.data_ptr(), out.data_ptr(), batch, heads * scores, v.shape[2] // scores),
            *(torch.get_num_threads(), v.dtype == torch.bfloat16),
        )
    )
    return out if out.dtype == dtype else out.to(dtype)
