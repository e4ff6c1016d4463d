"""Delta rule: a matrix-valued state that decays, corrects itself by a rank-one product and takes in an outer product.

    S_t = (diag(exp(g_t)) + a_t b_t^T) S_{t-1} + k_t^T v_t        S in R^{K x V}
    o_t = scale * q_t S_t

b_t^T S_{t-1} is what the state remembers under b_t; a_t says where, and how much of it, to take away. The published
models are choices of the arguments (n a key of length 1, beta the learning rate, alpha = exp(g) the decay):

    model             its state                                     k       a              b        g
    DeltaNet          (I - beta n n^T) S + beta n^T v               beta n  -beta n        n        None
    Gated DeltaNet    alpha (I - beta n n^T) S + beta n^T v         beta n  -beta alpha n  n        per head
    Kimi Delta (KDA)  (I - beta n n^T) diag(alpha) S + beta n^T v   beta n  -beta n        alpha n  per channel
    RWKV-7            (diag(alpha) - (eta n) n^T) S + k^T v         k       -eta n         n        per channel

(RWKV-7 writes its state transposed, V x K; eta is its in-context learning rate, a vector.)

B batch, T time, H query heads, Hk key/value heads, K key width, V value width.
Sources: Schlag et al. 2021 and Yang et al. 2024 (DeltaNet), Yang, Kautz and Hatamizadeh 2024 (Gated DeltaNet), Kimi
Linear 2025 (KDA), Peng et al. 2025 (RWKV-7).
"""

from __future__ import annotations

from torch import Tensor

from .. import native
from ..checks import check_steps, expect, expect_axes, expect_ndim
from ..dispatch import dispatch, dispatch_alike
from ..errors import ShapeError
from ..registration import register_backends
from . import chunked, cpu, reference

__all__ = ["delta_rule", "delta_rule_step"]


def _triton():
    from . import triton_

    return triton_


def _cpu_step_supports(*, q, k, v, a, b, g, state, scale) -> str | None:
    return native.supports_step("delta_rule", {"q": q, "k": k, "v": v, "a": a, "b": b}, state)


register_backends("delta_rule", "delta_rule", reference, chunked, cpu, _triton)
register_backends("delta_rule", "delta_rule_step", reference, chunked, cpu, cpu_supports=_cpu_step_supports)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_ids: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Reads each step's state with its query; see the module's equations and which arguments make which model.

    Args:
        q: (B, T, H, K); query head h reads the state of head h // (H // Hk).
        k, a, b: (B, T, Hk, K). v: (B, T, Hk, V). Nothing is normalised here: it is for the caller to choose a and b so
            that diag(exp(g)) + a b^T does not make the state grow.
        g: log decay, <= 0, natural log per step: (B, T, Hk, K) per channel, (B, T, Hk, 1) per head, or None.
        scale: None is K**-0.5.
        initial_state: (B, Hk, K, V); None: zeros.
        seq_ids: (B, T) integers; the state is zeroed where the id differs from the valid step before. The first step
            continues `initial_state`.
        mask: (B, T) booleans; a step with False leaves the state as it was and gives a zero output.
        backend: which implementation; None chooses the fastest (`kernels/dispatch.py`).
    Returns:
        o: (B, T, H, V) in v's dtype, and the last state, (B, Hk, K, V) in float32 (float64 for float64 inputs).
    Raises:
        ShapeError: names the argument, its shape and the expected one.
    """
    expect_ndim("q", q, 4, "(batch, time, heads, key width)")
    expect_ndim("v", v, 4, "(batch, time, heads, value width)")
    batch, time, heads, keys = q.shape
    state_heads, values = v.shape[2:]
    if 0 in (heads, state_heads) or heads % state_heads:
        raise ShapeError(f"q has {heads} heads and v has {state_heads}; expected q's to be a multiple of v's.")
    expect("v", v, (batch, time, state_heads, values))
    for name, tensor in (("k", k), ("a", a), ("b", b)):
        expect(name, tensor, (batch, time, state_heads, keys))
    if g is not None:
        expect("g", g, (batch, time, state_heads, keys), (batch, time, state_heads, 1))
    if initial_state is not None:
        expect("initial_state", initial_state, (batch, state_heads, keys, values))
    check_steps(seq_ids, mask, batch, time)
    call = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g}
    call |= {"scale": max(keys, 1) ** -0.5 if scale is None else scale}
    call |= {"initial_state": initial_state, "seq_ids": seq_ids, "mask": mask}
    return dispatch("delta_rule", call, backend)


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of decoding, without gradients: the output (B, H, V); `state` (B, Hk, K, V) is changed **in place**.

    Args:
        q: (B, H, K). k, a, b: (B, Hk, K). v: (B, Hk, V). g: (B, Hk, K), (B, Hk, 1) or None.
    """
    expect_axes("state", state, 4, "(batch, heads, K, V)")
    batch, heads, keys, values = state.shape
    if not (
        q.ndim == 3
        and 0 not in (heads, q.shape[1])
        and q.shape[::2] == (batch, keys)
        and q.shape[1] % heads == 0
        and k.shape == a.shape == b.shape == (batch, heads, keys)
        and v.shape == (batch, heads, values)
        and (g is None or g.shape in ((batch, heads, 1), (batch, heads, keys)))
    ):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip("qkvab", (q, k, v, a, b), strict=True))
        raise ShapeError(f"{shapes} and g do not fit the state {tuple(state.shape)} (batch, heads, K, V).")
    call = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g, "state": state}
    call["scale"] = max(keys, 1) ** -0.5 if scale is None else scale
    alike = (q.dtype, k.dtype, v.dtype, a.dtype, b.dtype, state.dtype, state.device, state.is_contiguous())
    return dispatch_alike("delta_rule_step", call, alike, backend)
