"""Delta rule in C (`cpu.c`), forward and backward, as custom operators that autograd and torch.compile know."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..native import function, pointer
from ..steps import step_codes

CHUNK = 32  # as in cpu.c
STEP_PARALLEL_FLOATS = 1 << 16  # a step on a smaller state is over before other threads have woken up


def delta_rule(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.delta_rule`."""
    output_dtype = v.dtype
    if len({x.dtype for x in (q, k, v, a, b)}) > 1:
        q, k, v, a, b = (x.to(torch.float32) for x in (q, k, v, a, b))
    g = None if g is None else g.to(torch.float32)
    inputs = (q, k, v, a, b, g, initial_state)
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, state, _ = forward(*inputs, step_codes(seq_ids, mask), scale, needed)
    return o.to(output_dtype), state


@torch.library.custom_op("rnnzoo::delta_rule_cpu", mutates_args=())
def forward(
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
    o, state, kept = _empty_outputs(q, k, v, a, b, g, initial, codes, scale, keep)
    initial = None if initial is None else initial.to(torch.float32)
    tensors = [None if x is None else x.contiguous() for x in (q, k, v, a, b, g, initial, codes)]
    function("delta_rule", "delta_rule_forward", "p" * 11 + "i" * 9 + "f")(
        *(pointer(x) for x in (*tensors, o, state, kept if keep else None)), *_sizes(q, v, g), scale
    )
    return o, state, kept


@forward.register_fake
def _empty_outputs(q, k, v, a, b, g, initial, codes, scale, keep):
    batch, time, heads, values = v.shape
    keys = q.shape[-1]
    chunks = -(-time // CHUNK) if keep else 0
    return (
        v.new_empty(batch, time, q.shape[2], values),
        v.new_empty(batch, heads, keys, values, dtype=torch.float32),
        v.new_empty(batch, heads, chunks, keys, values, dtype=torch.float32),
    )


@torch.library.custom_op("rnnzoo::delta_rule_cpu_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    codes: Tensor | None,
    kept: Tensor,
    d_out: Tensor,
    d_state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, b, g (empty without one) and the initial state."""
    gradients = _empty_gradients(q, k, v, a, b, g, codes, kept, d_out, d_state, scale)
    tensors = [None if x is None else x.contiguous() for x in (q, k, v, a, b, g, codes, kept, d_out, d_state)]
    function("delta_rule", "delta_rule_backward", "p" * 17 + "i" * 9 + "f")(
        *(pointer(x) for x in (*tensors, *gradients)), *_sizes(q, v, g), scale
    )
    return gradients


@backward.register_fake
def _empty_gradients(q, k, v, a, b, g, codes, kept, d_out, d_state, scale):
    like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    dg = v.new_empty(0, dtype=torch.float32) if g is None else like(g)
    return like(q), like(k), like(v), like(a), like(b), dg, like(d_state)


def _sizes(q: Tensor, v: Tensor, g: Tensor | None) -> tuple[int, ...]:
    batch, time, heads, values = v.shape
    keys = q.shape[-1]
    kind = 0 if g is None else 1 if g.shape[-1] == 1 else 2
    bf16 = int(v.dtype == torch.bfloat16)
    return batch, time, heads, q.shape[2] // heads, keys, values, kind, bf16, torch.get_num_threads()


def _remember(ctx, inputs, output):
    q, k, v, a, b, g, initial, codes, scale, _ = inputs
    ctx.save_for_backward(q, k, v, a, b, g, codes, output[2])
    ctx.scale, ctx.decays = scale, g is not None
    ctx.initial_dtype = None if initial is None else initial.dtype
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx, d_out, d_state, _):
    *gradients, dg, d_initial = backward(*ctx.saved_tensors, d_out, d_state, ctx.scale)
    dg = dg if ctx.decays else None
    d_initial = None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)
    return *gradients, dg, d_initial, None, None, None


forward.register_autograd(_gradients, setup_context=_remember)


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
    bf16 = v.dtype == torch.bfloat16
    batch, heads, keys, values = state.shape
    kind = 0
    if g is not None:
        kind, g = 1 if g.shape[-1] == 1 else 2, g.float().contiguous()
    o = torch.empty((batch, q.shape[1], values), dtype=v.dtype)
    q, k, v, a, b = q.contiguous(), k.contiguous(), v.contiguous(), a.contiguous(), b.contiguous()
    threads = 1 if state.numel() < STEP_PARALLEL_FLOATS else torch.get_num_threads()
    _step()(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), a.data_ptr(), b.data_ptr(), None if g is None else g.data_ptr()),
        *(state.data_ptr(), o.data_ptr(), batch * heads, q.shape[1] // heads, keys, values, kind, bf16, threads, scale),
    )
    return o if o.dtype == dtype else o.to(dtype)
