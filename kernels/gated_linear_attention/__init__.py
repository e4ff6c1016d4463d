"""Gated linear attention: a matrix-valued state that decays and takes in one outer product a step.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t        S in R^{K x V}
    o_t = scale * q_t S_t

with three options: a bonus u on the current token, a normaliser (a denominator that sums the weights), and a window in
which the weights are those of softmax attention while everything older is in S, under one denominator.

B batch, T time, H query heads, Hk key/value heads, K key (feature) width, V value width, D window key width.
Sources: Katharopoulos et al. 2020 (g = 0, normaliser), RetNet 2023 (g constant), GLA 2024 (g per channel), Mamba-2 2024
(g per head), RWKV-6 2024 (bonus), Based and LoLCATs 2024 (window), StreamingLLM 2024 (sinks).
"""

from __future__ import annotations

from torch import Tensor

from .. import gpu, native
from ..checks import check_steps, expect, expect_axes
from ..dispatch import dispatch, dispatch_alike
from ..errors import RnnzooError, ShapeError
from ..registration import register_backends
from . import chunked, cpu, reference
from .state import Window, WindowState, ring_positions, ring_slots

__all__ = [
    "Window",
    "WindowState",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "ring_positions",
    "ring_slots",
]


def _triton():
    from . import triton_

    return triton_


def _not_fused(q: Tensor, v: Tensor, window: Window | None) -> str | None:
    """Why no fused backend takes the call, whatever the device."""
    if window is not None:
        return "a window"
    return "an empty width" if q.shape[-1] == 0 or v.shape[-1] == 0 else None


def _triton_supports(**call) -> str | None:
    return _not_fused(call["q"], call["v"], call["window"]) or gpu.supports(call)


def _cpu_supports(**call) -> str | None:
    return _not_fused(call["q"], call["v"], call["window"]) or native.supports("gated_linear_attention", call)


def _cpu_step_supports(*, q, k, v, g, state, bonus, scale, normalize) -> str | None:
    return _not_fused(q, v, None) or native.supports_step("gated_linear_attention", {"v": v}, state)


register_backends(
    *("gated_linear_attention", "gated_linear_attention", reference, chunked, cpu, _triton),
    cpu_supports=_cpu_supports,
    triton_supports=_triton_supports,
)
register_backends(
    *("gated_linear_attention", "gated_linear_attention_step", reference, chunked, cpu),
    cpu_supports=_cpu_step_supports,
)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    window: Window | None = None,
    initial_state: Tensor | WindowState | None = None,
    seq_ids: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | WindowState]:
    """Reads each step's state with its query; see the module's equations.

    With `bonus` u: o_t = scale * q_t (S_{t-1} + diag(u) k_t^T v_t), where S_{t-1} is not yet decayed by g_t.
    With `normalize`: v gets a column of ones, and o_t = numerator / denominator (0 where the denominator is 0).
    With `window`: a token enters S when it leaves the window, sinks never do, and o_t = (sum A v + sum L v) /
    (sum A + sum L), with A the window's weights (see `Window`) and L = scale * q_t . (decayed k_j).

    Args:
        q: (B, T, H, K); query head h reads the state of head h // (H // Hk). K may be 0.
        k: (B, T, Hk, K). v: (B, T, Hk, V).
        g: log decay, <= 0, natural log per step: (B, T, Hk, K) per channel, (B, T, Hk, 1) per head, (Hk,) constant, or
            None for no decay. With a window only (Hk,) or None.
        bonus: (H, K); not with `normalize` or `window`.
        scale: None is K**-0.5, or 1 with `normalize` or `window`.
        initial_state: (B, Hk, K, V), (B, Hk, K, V+1) with `normalize`, a WindowState with `window`; None: empty.
        seq_ids: (B, T) integers; state, window and sinks are emptied where the id differs from the valid step before.
            The first step continues `initial_state`.
        mask: (B, T) booleans; a step with False changes no state and gives a zero output.
        backend: which implementation; None chooses the fastest (`kernels/dispatch.py`).
    Returns:
        o: (B, T, H, V) in v's dtype, and the state after the last step, in float32 (float64 for float64 inputs).
    Raises:
        ShapeError: names the argument, its shape and the expected one. RnnzooError: options that exclude each other.
    """
    _check(q, k, v, g, bonus, normalize, window, initial_state, seq_ids, mask)
    if scale is None:
        scale = 1.0 if normalize or window is not None or q.shape[-1] == 0 else q.shape[-1] ** -0.5
    call = {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "bonus": bonus,
        "scale": scale,
        "normalize": normalize,
        "window": window,
        "initial_state": initial_state,
        "seq_ids": seq_ids,
        "mask": mask,
    }
    return dispatch("gated_linear_attention", call, backend)


def gated_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    bonus: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """One step of decoding, without gradients: the output (B, H, V); `state` is changed **in place**.

    Args:
        q: (B, H, K). k: (B, Hk, K). v: (B, Hk, V). g: (B, Hk, K), (B, Hk, 1), (Hk,) or None. bonus: (H, K).
        state: (B, Hk, K, V), (B, Hk, K, V+1) with `normalize`; float32 (float64 for float64 inputs).
    """
    expect_axes("state", state, 4, "(batch, heads, K, V or V + 1)")
    batch, heads, keys, columns = state.shape
    if not (
        q.ndim == 3
        and 0 not in (heads, q.shape[1])
        and q.shape[::2] == (batch, keys)
        and q.shape[1] % heads == 0
        and k.shape == (batch, heads, keys)
        and v.shape == (batch, heads, columns - normalize)
        and (g is None or g.shape in ((batch, heads, keys), (batch, heads, 1), (heads,)))
        and (bonus is None or (bonus.shape == q.shape[1:] and not normalize))
    ):
        shapes = ", ".join(
            f"{name} {tuple(x.shape)}"
            for name, x in {"q": q, "k": k, "v": v, "g": g, "bonus": bonus}.items()
            if x is not None
        )
        raise ShapeError(f"{shapes} do not fit the state {tuple(state.shape)} (batch, heads, K, V or V + 1).")
    if scale is None:
        scale = 1.0 if normalize or keys == 0 else keys**-0.5
    call = {"q": q, "k": k, "v": v, "g": g, "state": state, "bonus": bonus, "scale": scale, "normalize": normalize}
    alike = (q.dtype, k.dtype, v.dtype, g is None or g.dtype, state.dtype, state.device, state.is_contiguous())
    alike += (None if g is None else g.ndim, bonus is None or bonus.dtype, normalize, keys, columns)
    return dispatch_alike("gated_linear_attention_step", call, alike, backend)


def _check(q, k, v, g, bonus, normalize, window, initial_state, seq_ids, mask) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected (batch, time, heads, width).")
    batch, time, heads, width = q.shape
    kv_heads, value_width = v.shape[2:]
    if time == 0:
        raise ShapeError(f"q has shape {tuple(q.shape)}; expected at least one time step.")
    if 0 in (heads, kv_heads) or heads % kv_heads:
        raise ShapeError(f"q has {heads} heads and v has {kv_heads}; expected q's to be a multiple of v's.")
    expect("k", k, (batch, time, kv_heads, width))
    expect("v", v, (batch, time, kv_heads, value_width))
    if g is not None:
        constant = (kv_heads,)
        if window is not None:
            if tuple(g.shape) != constant:
                raise ShapeError(f"g has shape {tuple(g.shape)}; with a window expected a constant decay {constant}.")
        else:
            expect("g", g, (batch, time, kv_heads, width), (batch, time, kv_heads, 1), constant)
    if bonus is not None:
        if normalize or window is not None:
            raise RnnzooError("bonus cannot be combined with normalize or window; leave one of them out.")
        expect("bonus", bonus, (heads, width))
    check_steps(seq_ids, mask, batch, time)
    if window is not None:
        _check_window(q, v, window, initial_state)
    elif initial_state is not None:
        expect("initial_state", initial_state, (batch, kv_heads, width, value_width + int(normalize)))


def _check_window(q: Tensor, v: Tensor, window: Window, state: Tensor | WindowState | None) -> None:
    batch, time, heads, width = q.shape
    kv_heads, value_width = v.shape[2:]
    key_width = window.q.shape[-1]
    if key_width == 0 or value_width == 0:
        widths = f"window.q has shape {tuple(window.q.shape)} and v {tuple(v.shape)}"
        raise ShapeError(f"{widths}; a window expects heads of at least one number.")
    lengths = tuple(window.lengths)
    if len(lengths) != kv_heads or any(length < 1 for length in lengths):
        raise ShapeError(
            f"window.lengths is {lengths}; expected {kv_heads} integers of at least 1, one for each k head."
        )
    if window.sinks < 0:
        raise ShapeError(f"window.sinks is {window.sinks}; expected 0 or more.")
    if window.anchor not in ("absolute", "max"):
        raise RnnzooError(f"window.anchor is {window.anchor!r}; expected 'absolute' or 'max'.")
    expect("window.q", window.q, (batch, time, heads, key_width))
    expect("window.k", window.k, (batch, time, kv_heads, key_width))
    if window.q_sink is not None:
        expect("window.q_sink", window.q_sink, (batch, time, heads, key_width))
    if window.factor is not None:
        expect("window.factor", window.factor, (heads,))
    if state is None:
        return
    if not isinstance(state, WindowState):
        raise ShapeError(f"initial_state is a {type(state).__name__}; with a window expected a WindowState.")
    rows = sum(lengths)
    expect("initial_state.s", state.s, (batch, kv_heads, width, value_width + 1))
    expect("initial_state.ring_k", state.ring_k, (batch, rows, key_width))
    expect("initial_state.ring_v", state.ring_v, (batch, rows, value_width))
    expect("initial_state.sink_k", state.sink_k, (batch, kv_heads, window.sinks, key_width))
    expect("initial_state.sink_v", state.sink_v, (batch, kv_heads, window.sinks, value_width))
    expect("initial_state.count", state.count, (batch,))
    if width > 0:
        if window.ring_features is None:
            raise ShapeError(
                "window.ring_features is None; with an initial_state expected the features "
                f"{(batch, rows, width)} of its ring rows."
            )
        if time > 1 or window.ring_features.shape != (batch, kv_heads, width):
            expect("window.ring_features", window.ring_features, (batch, rows, width))
