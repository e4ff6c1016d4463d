"""Gated linear attention in C (`cpu.c`): custom operators that autograd and torch.compile know, and the plain step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..native import function, pointer
from ..operators import contiguous, differentiable, needs_gradient
from ..steps import step_codes

CHUNK = 64  # as in cpu.c
NO_DECAY, CONSTANT, PER_HEAD, PER_CHANNEL = range(4)


def gated_linear_attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    normalize: bool,
    window: None,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.gated_linear_attention`; no window."""
    assert window is None
    output_dtype = v.dtype
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = (x.to(torch.float32) for x in (q, k, v))
    g, bonus = (None if x is None else x.to(torch.float32) for x in (g, bonus))
    inputs = (q, k, v, g, bonus, initial_state)
    needed = needs_gradient(*inputs)
    codes = step_codes(seq_ids, mask)
    o, state, _, _ = forward(*inputs, codes, float(scale), normalize, needed)
    return o.to(output_dtype), state


def gated_linear_attention_step(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    bonus: Tensor | None,
    scale: float,
    normalize: bool,
) -> Tensor:
    """See `kernels.gated_linear_attention_step`. A plain call: a custom operator would cost more than the work."""
    batch, heads, width = q.shape
    dtype = v.dtype
    if q.dtype != dtype or k.dtype != dtype:
        q, k, v = q.float(), k.float(), v.float()
    kind = _kind(g)
    if g is not None:
        g = g.float().contiguous()
    if bonus is not None:
        bonus = bonus.float().contiguous()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    o = torch.empty_like(v) if v.shape[1] == heads else v.new_empty(batch, heads, v.shape[2])
    _step()(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), None if g is None else g.data_ptr()),
        *(None if bonus is None else bonus.data_ptr(), state.data_ptr(), o.data_ptr()),
        *(batch, heads, v.shape[1], width, v.shape[2], kind, normalize, torch.get_num_threads()),
        v.dtype == torch.bfloat16,
        scale,
    )
    return o if o.dtype == dtype else o.to(dtype)


@functools.cache
def _step() -> Callable[..., None]:
    return function("gated_linear_attention", "gated_linear_attention_step", "p" * 7 + "i" * 9 + "f")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    initial: Tensor | None,
    codes: Tensor | None,
    scale: float,
    normalize: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, states before each chunk, denominators): the last two for backward, empty unless `keep`."""
    o, state, kept, denominators = _empty_outputs(q, k, v, g, bonus, initial, codes, scale, normalize, keep)
    initial = None if initial is None else initial.to(torch.float32)
    inputs = contiguous(q, k, v, g, bonus, initial, codes)
    function("gated_linear_attention", "gated_linear_attention_forward", "p" * 11 + "i" * 10 + "f")(
        *(pointer(x) for x in (*inputs, o, state)),
        pointer(kept) if keep else None,
        pointer(denominators) if keep and normalize else None,
        *_numbers(q, v, g, normalize),
        scale,
    )
    return o, state, kept, denominators


def _empty_outputs(q, k, v, g, bonus, initial, codes, scale, normalize, keep):
    batch, time, heads, width = q.shape
    kv_heads, value_width = v.shape[2:]
    columns = value_width + int(normalize)
    chunks = -(-time // CHUNK) if keep else 0
    return (
        v.new_empty(batch, time, heads, value_width),
        v.new_empty(batch, kv_heads, width, columns, dtype=torch.float32),
        v.new_empty(batch, kv_heads, chunks, width, columns, dtype=torch.float32),
        v.new_empty((batch, time, heads) if keep and normalize else (0,), dtype=torch.float32),
    )


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    codes: Tensor | None,
    o: Tensor,
    kept: Tensor,
    denominators: Tensor,
    do: Tensor,
    dstate: Tensor,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, bonus (empty where there is none) and the initial state."""
    _, _, _, dg, dbonus, _ = found = _empty_gradients(
        q, k, v, g, bonus, codes, o, kept, denominators, do, dstate, scale, normalize
    )
    batch, _, heads, width = q.shape
    # Sums over all steps: in double for each batch row, one task after the other, so that threads change no order.
    sums = None if g is None or g.ndim > 1 else torch.zeros(batch, len(g), dtype=torch.float64)
    bonus_sums = None if bonus is None else torch.zeros(batch, heads, width, dtype=torch.float64)
    inputs = contiguous(q, k, v, g, bonus, codes, kept, denominators, o, do, dstate)
    function("gated_linear_attention", "gated_linear_attention_backward", "p" * 17 + "i" * 10 + "f")(
        *(pointer(x) for x in (*inputs, *found[:3], dg if sums is None else sums, bonus_sums, found[5])),
        *_numbers(q, v, g, normalize),
        scale,
    )
    if sums is not None:
        dg.copy_(sums.sum(0))
    if bonus_sums is not None:
        dbonus.copy_(bonus_sums.sum(0))
    return found


def _empty_gradients(q, k, v, g, bonus, codes, o, kept, denominators, do, dstate, scale, normalize):
    def like(x):
        return q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(g), like(bonus), like(dstate)


def _kind(g: Tensor | None) -> int:
    """Of the decay; with one channel, per head and per channel are the same numbers."""
    if g is None:
        return NO_DECAY
    return CONSTANT if g.ndim == 1 else PER_CHANNEL if g.shape[-1] > 1 else PER_HEAD


def _numbers(q: Tensor, v: Tensor, g: Tensor | None, normalize: bool) -> tuple[int, ...]:
    """The sizes and flags that end the C functions' arguments."""
    batch, time, heads, width = q.shape
    sizes = (batch, time, heads, v.shape[2], width, v.shape[3])
    return *sizes, _kind(g), int(normalize), torch.get_num_threads(), int(v.dtype == torch.bfloat16)


forward = differentiable(
    "gated_linear_attention_cpu", _forward, _backward, _empty_outputs, _empty_gradients, "o state kept denominators"
)
