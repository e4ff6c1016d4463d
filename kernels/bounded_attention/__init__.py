"""Softmax attention to a bounded number of tokens: the first ones, the last ones, and those that matter most.

    o_t = sum_{j in C_t} softmax_j(scale q_t . k_j) v_j
    C_t = C_{t-1} + {t}, without argmin_j score_j over the tokens j of C_{t-1} that are none of the document's first
          `sinks` nor of its last `recents`, if C_t would be more than `capacity` tokens beside the sinks

A score is known when its token is written and does not change, so what C_t is follows from the scores alone, and one
attention over all tokens, with a mask, gives what token by token does. Equal scores: the older token goes. With a
`reach`, tokens so far back are not seen any more, unless they are sinks, and go first. Scores are kept in bfloat16 and
compared so. Each kv head has a capacity, scores and a set of tokens of its own.

Eviction by a score that is fixed when a token is written: KVzap (arXiv 2601.07891) by threshold, TRIM-KV (arXiv
2512.03324) by a learned gate with decay.

B batch, T time, H query heads, Hk kv heads, D key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..checks import check_steps, expect, expect_ndim
from ..dispatch import dispatch
from ..registration import register_backends
from ..rows import MOST_SINKS, contiguous, parts
from . import chunked, cpu, reference
from .state import BoundedState, Bounds

__all__ = ["BoundedState", "Bounds", "bounded_attention", "bounded_step", "kept_until"]


def _cpu_step_supports(*, q, k, v, score, state, bounds, q_sink, scale) -> str | None:
    if bounds.sinks > MOST_SINKS:
        return f"more than {MOST_SINKS} sinks"
    if not contiguous(state.k, state.v, state.score, state.position):
        return "a state that is not contiguous"
    return native.supports("bounded_attention", {"q": q, "k": k, "v": v, "score": score, "state": parts(state.k)[0]})


register_backends("bounded_attention", "bounded_attention", reference, chunked)
register_backends("bounded_attention", "bounded_step", reference, chunked, cpu, cpu_supports=_cpu_step_supports)
register_backends("bounded_attention", "retention", chunked, chunked, cpu)


def bounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    *,
    bounds: Bounds,
    q_sink: Tensor | None = None,
    scale: float | None = None,
    initial_state: BoundedState | None = None,
    seq_ids: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, BoundedState]:
    """Outputs (B, T, H, V) and the state after the last token. Gradients reach q, k and v, not the scores.

    Args:
        q: (B, T, H, D), k: (B, T, Hk, D), v: (B, T, Hk, V); queries and keys with their rotation.
        score: (B, T, Hk), of each token for each kv head; the largest stay.
        bounds: how many tokens are kept, see `Bounds`.
        q_sink: (B, T, H, D), queries against sinks; None: q. scale: of the scores q . k; None: D^-0.5.
        initial_state: tokens from calls before, without gradients where they are kept in few bits; None: none.
        seq_ids: (B, T) integers; a new document starts where the id differs from the step before.
        mask: (B, T) bool, False: not a token; outputs there mean nothing. backend: None chooses the fastest.
    Raises:
        ShapeError: names the argument, its shape and the expected one.
    """
    expect_ndim("q", q, 4, "(batch, time, heads, width)")
    batch, time, heads, width = q.shape
    kv_heads = len(bounds.capacities)
    expect("k", k, (batch, time, kv_heads, width))
    expect("v", v, (batch, time, kv_heads, v.shape[-1]))
    expect("score", score, (batch, time, kv_heads))
    if heads % kv_heads:
        expect("q", q, (batch, time, kv_heads, width))
    if q_sink is not None:
        expect("q_sink", q_sink, (batch, time, heads, width))
    check_steps(seq_ids, mask, batch, time)
    if initial_state is None:
        initial_state = BoundedState.zeros(batch, bounds, width, v.shape[-1], k.dtype, k.device)
    expect("initial_state.position", initial_state.position, (batch, sum(bounds.rows)))
    call = {"q": q, "k": k, "v": v, "score": score, "bounds": bounds, "q_sink": q_sink}
    call |= {"scale": width**-0.5 if scale is None else scale, "initial_state": initial_state}
    return dispatch("bounded_attention", call | {"seq_ids": seq_ids, "mask": mask}, backend)


def bounded_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    state: BoundedState,
    *,
    bounds: Bounds,
    q_sink: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The output (B, H, V) of one token; `state` is changed **in place**. Without gradients and without a mask.

    Args:
        q: (B, H, D), k: (B, Hk, D), v: (B, Hk, V), score: (B, Hk); k and v are rounded to what the state holds, also
            for this step. The others as in `bounded_attention`.
    Raises:
        ShapeError: names the argument, its shape and the expected one.
    """
    batch, kv_heads = len(state.count), len(bounds.capacities)
    expect("q", q, (batch, q.shape[1], k.shape[-1]))
    expect("k", k, (batch, kv_heads, k.shape[-1]))
    expect("v", v, (batch, kv_heads, v.shape[-1]))
    expect("score", score, (batch, kv_heads))
    expect("state.position", state.position, (batch, sum(bounds.rows)))
    call = {"q": q, "k": k, "v": v, "score": score, "state": state, "bounds": bounds, "q_sink": q_sink}
    return dispatch("bounded_step", call | {"scale": k.shape[-1] ** -0.5 if scale is None else scale}, backend)


def kept_until(score: Tensor, bounds: Bounds, *, backend: str | None = None) -> Tensor:
    """(B, T, Hk) int64: the first step at which a token is not kept any more, T where it is to the end.

    Args:
        score: (B, T, Hk), one document a row, from its first token on; positions do not count (no `reach`).
    """
    batch, time, kv_heads = score.shape
    expect("score", score, (batch, time, len(bounds.capacities)))
    score = score.detach().to(torch.bfloat16).transpose(1, 2).float()
    position = torch.zeros(batch, kv_heads, max(bounds.rows), dtype=torch.int32, device=score.device)
    call = {"score": torch.cat([torch.zeros_like(position).float(), score], 2), "position": position, "bounds": bounds}
    call |= {"count": torch.zeros(batch, dtype=torch.int64, device=score.device), "seq_ids": None, "mask": None}
    until, _, _ = dispatch("retention", call, backend)
    return until[:, :, max(bounds.rows) :].transpose(1, 2)
