"""One token through `gated_linear_attention` with a window, in place: what decoding runs in every layer.

The equations are those of `gated_linear_attention` with `window`. Rings and sinks may be plain tensors or packed into 8
or 4 bits (`kernels/block_floating_point.py`); they are read as they are, and only the new token's rows are written.

B batch, H query heads, Hk key/value heads, F feature width, D key width, V value width, R ring rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..checks import expect_all, expect_axes
from ..dispatch import dispatch
from ..errors import ShapeError
from ..registration import register_backends
from ..rows import MOST_SINKS, contiguous, parts
from . import chunked, cpu, reference
from .state import State

__all__ = ["State", "leaving_keys", "window_step"]


def _cpu_keys_supports(*, state, lengths, dtype) -> str | None:
    if not contiguous(state.ring_k):
        return "a ring that is not contiguous"
    return native.supports("window_step", {"dtype": torch.empty(0, dtype=dtype), "ring": parts(state.ring_k)[0]})


def _cpu_supports(*, q, near, far, k, v, leaving, g, factor, state, lengths, sinks, anchor, scale) -> str | None:
    if sinks > MOST_SINKS:
        return f"more than {MOST_SINKS} sinks"
    if state.s.dtype != torch.float32:
        return f"the state is {str(state.s.dtype).removeprefix('torch.')}"
    if not contiguous(state.s, state.ring_k, state.ring_v, state.sink_k, state.sink_v):
        return "a state that is not contiguous"
    tensors = {"q": q, "near": near, "k": k, "v": v, "s": state.s, "ring": parts(state.ring_k)[0]}
    return native.supports("window_step", tensors)


register_backends("window_step", "window_step", reference, chunked, cpu, cpu_supports=_cpu_supports)
register_backends("window_step", "leaving_keys", reference, chunked, cpu, cpu_supports=_cpu_keys_supports)


def window_step(
    q: Tensor,
    near: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    lengths: tuple[int, ...],
    sinks: int = 0,
    far: Tensor | None = None,
    leaving: Tensor | None = None,
    g: Tensor | None = None,
    factor: Tensor | None = None,
    anchor: str = "absolute",
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The output (B, H, V) of one token; `state` is changed **in place**. Without gradients and without a mask.

    Args:
        q: (B, H, F) features of the query. near: (B, H, D) the query of the window; far: that of the sinks, None: near.
        k: (B, Hk, D), v: (B, Hk, V) of the new token; rounded to what the rings hold, also for this step.
        lengths, sinks, factor, anchor: as in `Window`. g: (Hk,) log decay of the linear part, or None.
        leaving: (B, Hk, F) features of the tokens whose rows the new one takes (`ring_slots`); None where F is 0.
        scale: of the linear part. backend: which implementation; None chooses the fastest.
    Raises:
        ShapeError: names the argument, its shape and the expected one.
    """
    expect_axes("state.s", state.s, 4, "(batch, k heads, features, V + 1)")
    expect_axes("near", near, 3, "(batch, heads, D)")
    batch, kv_heads, width, columns = state.s.shape
    heads, keys, values = near.shape[1], near.shape[2], columns - 1
    if kv_heads != len(lengths) or kv_heads == 0 or heads % kv_heads or 0 in (keys, values):
        raise ShapeError(
            f"state.s has shape {tuple(state.s.shape)} and near {tuple(near.shape)} with {len(lengths)} lengths; "
            "expected a length for each k head, of which near has a multiple, and heads of at least one number."
        )
    shapes = {
        "near": (near, (batch, heads, keys)),
        "far": (far, (batch, heads, keys)),
        "k": (k, (batch, kv_heads, keys)),
        "v": (v, (batch, kv_heads, values)),
        "q": (q, (batch, heads, width)),
        "leaving": (leaving if width else None, (batch, kv_heads, width)),
        "g": (g, (kv_heads,)),
        "factor": (factor, (heads,)),
    }
    rows = sum(lengths)
    shapes |= {
        "state.ring_k": (state.ring_k, (batch, rows, keys)),
        "state.ring_v": (state.ring_v, (batch, rows, values)),
    }
    for name, tensor, columns in (("sink_k", state.sink_k, keys), ("sink_v", state.sink_v, values)):
        shapes[f"state.{name}"] = (tensor, (batch, kv_heads, sinks, columns))
    expect_all(shapes | {"state.count": (state.count, (batch,))})
    call = {
        "q": q,
        "near": near,
        "far": far,
        "k": k,
        "v": v,
        "leaving": leaving,
        "g": g,
        "factor": factor,
        "state": state,
        "lengths": lengths,
        "sinks": sinks,
        "anchor": anchor,
        "scale": scale,
    }
    return dispatch("window_step", call, backend)


def leaving_keys(
    state: State, *, lengths: tuple[int, ...], dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """Keys (B, Hk, D) of the tokens whose rows in the rings the next token takes; anything where there is none yet.

    Args:
        lengths: of the window of each head. dtype: of the result; None: the ring's own (float32 where it is packed).
    """
    ring = state.ring_k
    if not lengths:
        raise ShapeError("lengths is (); expected the length of the window of each k head.")
    batch, *_, width = ring.shape
    expect_all({"state.ring_k": (ring, (batch, sum(lengths), width)), "state.count": (state.count, (batch,))})
    if dtype is None:
        dtype = ring.dtype if isinstance(ring, Tensor) else torch.float32
    return dispatch("leaving_keys", {"state": state, "lengths": lengths, "dtype": dtype}, backend)
