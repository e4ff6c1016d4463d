"""Gated linear attention in Triton, forward and backward, as custom operators that autograd and torch.compile know.

The normaliser and the bonus stand around the kernels, in torch: the one is a column of ones in v, the other one product
for each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ..gpu import interpreted, tuned
from ..operators import differentiable, needs_gradient
from ..steps import step_codes
from .linear_part import divide
from .triton_kernels import CHUNK, KEPT, backward_kernel, forward_kernel


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
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    inputs = (q, k, v, g, initial_state)
    keep = needs_gradient(*inputs, bonus)
    o, state, _ = forward(*inputs, step_codes(seq_ids, mask), float(scale), bonus is not None, keep)
    if bonus is not None:
        o = o + _current(q, k, v, bonus, scale, mask)
    if normalize:
        o = divide(o[..., :-1], o[..., -1:])
    return o.to(output_dtype), state


def _current(q: Tensor, k: Tensor, v: Tensor, bonus: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """(B, T, H, V) scale * (q u k) v of each step."""
    q, k, v = q.float(), k.float(), v.float()
    if mask is not None:
        q, k, v = (torch.where(mask[..., None, None], x, 0.0) for x in (q, k, v))
    q = (q * bonus.float()).unflatten(2, (k.shape[2], -1))
    weights = scale * (q * k[:, :, :, None]).sum(-1, keepdim=True)  # (B, T, Hk, group, 1)
    return (weights * v[:, :, :, None]).flatten(2, 3)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    codes: Tensor | None,
    scale: float,
    late: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o in float32, final state, states before each KEPT-th chunk: what backward needs; empty unless `keep`).

    late: the state is read before the step's own factor and without what it writes.
    """
    o, state, kept = _empty_outputs(q, k, v, g, initial, codes, scale, late, keep)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    initial = None if initial is None else initial.contiguous()
    numbers, constants = _arguments(q, v, g, codes, late)

    def launch(sizes: dict[str, int]) -> None:
        forward_kernel[_grid(v, sizes)](
            *(q, k, v, q if g is None else g, q if initial is None else initial, q if codes is None else codes),
            *(o, state, kept, scale, *numbers),
            **constants,
            **sizes,
            HAS_INITIAL=initial is not None,
            KEEP=keep,
        )

    with torch.cuda.device_of(q):
        launch(_sizes("forward", q, v, launch))
    return o, state, kept


def _empty_outputs(q, k, v, g, initial, codes, scale, late, keep):
    batch, time, heads, width = q.shape
    kv_heads, columns = v.shape[2:]
    slots = -(-time // (CHUNK * KEPT)) if keep else 0
    return (
        v.new_empty(batch, time, heads, columns, dtype=torch.float32),
        v.new_empty(batch, kv_heads, width, columns, dtype=torch.float32),
        v.new_empty(batch, kv_heads, slots, width, columns, dtype=torch.float32),
    )


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    codes: Tensor | None,
    kept: Tensor,
    do: Tensor,
    dstate: Tensor,
    scale: float,
    late: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g (empty without g) and the initial state."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    do, dstate = do.contiguous(), dstate.contiguous()
    numbers, constants = _arguments(q, v, g, codes, late)
    batch, time, kv_heads = k.shape[:3]
    dv, dinitial = torch.empty_like(v), torch.empty_like(dstate)
    each = (k.shape[3],) if constants["CHANNELS"] else ()

    def launch(sizes: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
        grid = _grid(v, sizes)
        dq, dk = (x.new_empty(grid[1], *x.shape, dtype=torch.float32) for x in (q, k))
        dg = q.new_empty(grid[1] if g is not None else 0, batch, time, kv_heads, *each, dtype=torch.float32)
        backward_kernel[grid](
            *(q, k, v, q if g is None else g, q if codes is None else codes, kept, do, dstate),
            *(dq, dk, dv, dg, dinitial, scale, batch, *numbers),
            **constants,
            **sizes,
        )
        return dq, dk, dg

    with torch.cuda.device_of(q):
        dq, dk, dg = launch(_sizes("backward", q, v, launch))
    if g is None:
        dg = dg.sum(0)[:0]
    elif g.ndim == 1:
        dg = dg.double().sum((0, 1, 2)).to(g.dtype)
    else:
        dg = dg.sum(0).view(g.shape).to(g.dtype)
    return dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dv, dg, dinitial


def _empty_gradients(q, k, v, g, codes, kept, do, dstate, scale, late):
    def like(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), q.new_empty(0) if g is None else like(g), like(dstate)


def _sizes(kernel: str, q: Tensor, v: Tensor, launch: Callable[[dict[str, int]], Any]) -> dict[str, int]:
    """Columns of a program's state, and warps: it holds two states in registers, so a wide one is cut into blocks."""
    columns, block_k = v.shape[3], _rows(q)
    # Widths such as 65 (64 and a normaliser) take one block more, not one twice as wide.
    block_v = max(16, min(triton.next_power_of_2(columns), 64, 8192 // block_k))
    if columns > 16 and triton.next_power_of_2(columns) - columns >= columns // 2:
        block_v = min(block_v, triton.next_power_of_2(columns) // 2)
    rule = {"V": block_v}
    if interpreted():
        return rule
    rule |= {"num_warps": 4 if block_k * block_v <= 4096 else 8}
    others = [{"V": width, "num_warps": warps} for width in (16, 32, 64, 128) for warps in (2, 4, 8)]
    key = q.shape[3], columns, str(v.dtype)
    return tuned(f"gated_linear_attention {kernel}", key, rule, others, launch)


def _rows(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[3]))


def _grid(v: Tensor, sizes: dict[str, int]) -> tuple[int, int]:
    return v.shape[0] * v.shape[2], triton.cdiv(v.shape[3], sizes["V"])


def _arguments(
    q: Tensor, v: Tensor, g: Tensor | None, codes: Tensor | None, late: bool
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """What both kernels take alike: sizes and strides, and constants."""
    time, heads, width = q.shape[1:]
    kv_heads, columns = v.shape[2:]
    strides = (0, 0, 0, 0)
    if g is not None:
        strides = (0, 0, g.stride(0), 0) if g.ndim == 1 else (*g.stride()[:3], g.stride(3) if g.shape[3] > 1 else 0)
    constants = {
        "HAS_G": g is not None,
        "CHANNELS": g is not None and g.ndim == 4 and g.shape[3] > 1,
        "HAS_CODES": codes is not None,
        "LATE": late,
        "GROUP": heads // kv_heads,
        "L": CHUNK,
        "K": _rows(q),
        "EVERY": KEPT,
    }
    if not interpreted():
        constants |= {"num_stages": 1}
    return (time, heads, kv_heads, width, columns, *strides), constants


forward = differentiable(
    "gated_linear_attention_triton", _forward, _backward, _empty_outputs, _empty_gradients, "o state kept"
)
