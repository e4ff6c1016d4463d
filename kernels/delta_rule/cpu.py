"""Delta rule in C (`cpu.c`), forward and backward, as custom operators that autograd and torch.compile know."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..native import function, pointer
from ..operators import contiguous, differentiable
from .operators import empty_gradients, empty_outputs, fused

STEP_PARALLEL_FLOATS = 1 << 16  # a step on a smaller state is over before other threads have woken up


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    codes: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final state, states before each chunk: what backward needs; empty unless `keep`)."""
    o, state, kept = empty_outputs(q, k, v, a, b, g, initial, codes, scale, keep)
    initial = None if initial is None else initial.to(torch.float32)
    tensors = contiguous(q, k, v, a, b, g, initial, codes)
    function("delta_rule", "delta_rule_forward", "p" * 11 + "i" * 9 + "f")(
        *(pointer(x) for x in (*tensors, o, state, kept if keep else None)), *_sizes(q, v, g), scale
    )
    return o, state, kept


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    codes: Tensor | None,
    kept: Tensor,
    do: Tensor,
    dstate: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, b, g (empty without one) and the initial state."""
    found = empty_gradients(q, k, v, a, b, g, codes, kept, do, dstate, scale)
    tensors = contiguous(q, k, v, a, b, g, codes, kept, do, dstate)
    function("delta_rule", "delta_rule_backward", "p" * 17 + "i" * 9 + "f")(
        *(pointer(x) for x in (*tensors, *found)), *_sizes(q, v, g), scale
    )
    return found


forward = differentiable("delta_rule_cpu", _forward, _backward, empty_outputs, empty_gradients, "o state kept")
delta_rule = functools.partial(fused, forward)


def _sizes(q: Tensor, v: Tensor, g: Tensor | None) -> tuple[int, ...]:
    batch, time, heads, values = v.shape
    keys = q.shape[-1]
    kind = 0 if g is None else 1 if g.shape[-1] == 1 else 2
    bf16 = int(v.dtype == torch.bfloat16)
    return batch, time, heads, q.shape[2] // heads, keys, values, kind, bf16, torch.get_num_threads()


@functools.cache
def _step() -> Callable[..., None]:
    return function("delta_rule", "delta_rule_step", "p" * 8 + "i" * 7 + "f")


def delta_rule_step(
    *, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    """See `kernels.delta_rule_step`."""
    dtype = v.dtype
    if not (q.dtype == k.dtype == a.dtype == b.dtype == dtype):
        q, k, v, a, b = (x.float() for x in (q, k, v, a, b))
    q, k, v, a, b = q.contiguous(), k.contiguous(), v.contiguous(), a.contiguous(), b.contiguous()
    batch, heads, keys, values = state.shape
    decay = 0
    if g is not None:
        decay, g = 1 if g.shape[2] == 1 else 2, g.float().contiguous()
    groups = q.shape[1] // heads
    o = torch.empty_like(v) if groups == 1 else v.new_empty(batch, q.shape[1], values)
    threads = 1 if batch * heads * keys * values < STEP_PARALLEL_FLOATS else torch.get_num_threads()
    _step()(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), a.data_ptr(), b.data_ptr(), None if g is None else g.data_ptr()),
        *(state.data_ptr(), o.data_ptr(), batch * heads, groups, keys, values, decay),
        *(v.dtype == torch.bfloat16, threads, scale),
    )
    return o if o.dtype == dtype else o.to(dtype)
