"""The start of prototype features in closed form, from what a teacher's attention does on one sequence.

decay       ln 2 / (mean distance of the attention that lies beyond the window), after Taylor-Calibrate (2026).
prototypes  k-means centres c_f of the queries before rotation; the key map is c_f turned by the mean rotation over
            the distances beyond the window (fast channels average out), the query map the soft assignment to centres.
scale       per query head, least squares between the true and the approximated share of the mass beyond the window.

T tokens, H query heads, Hk kv heads, G = H / Hk, d head_dim, n rows (query positions looked at), F prototypes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.rotary import turn

LEAST_HALF_LIFE = 16.0  # tokens


def fit_head(
    mixer: Any,
    head: int,
    queries: slice,
    heads: tuple[Tensor, Tensor, Tensor, Tensor],
    rows: Tensor,
    rotation: tuple[Tensor, float],
    seed: int,
) -> None:
    """Sets prototypes, decay and scale of one kv head of a mixer, in place.

    Args:
        queries: the query heads of this kv head. heads: q (T, H, d) and k (T, Hk, d), and both rotated.
        rows: (n,), at least one, all beyond the head's window and sinks. rotation: as `RotaryFrequencies.get` gives it.
    """
    q, k, turned_q, turned_k = heads
    time, width = len(k), k.shape[-1]
    window, keys = mixer.lengths[head], torch.arange(len(k))[None]
    distance = rows[:, None] - keys
    far = (distance >= window) & (keys >= mixer.sinks)
    scores = torch.einsum("nhd,td->hnt", turned_q[rows, queries], turned_k[:, head]) * width**-0.5
    scores = scores.masked_fill(distance < 0, -torch.inf)
    share = torch.where(far, scores.softmax(-1), 0.0)
    mean_distance = float((share * distance).sum() / share.sum().clamp(min=1e-20)) - window
    half_life = max(mean_distance, LEAST_HALF_LIFE)

    centres = _k_means(q[rows, queries].flatten(0, 1), mixer.features, seed)
    key_map = _mean_rotation(centres, rotation, window, min(time, window + 2 * half_life)) * width**-0.5
    temperature = width**-0.5
    mixer.key_map[head] = key_map.T
    mixer.query_map[queries] = 2 * temperature * centres.T
    mixer.query_bias[queries] = -temperature * (centres**2).sum(-1)
    mixer.log_decay[head] = -math.log(2) / half_life

    mixer.log_scale[queries] = 0.0
    dtype, delay = mixer.key_map.dtype, (distance - window).float().masked_fill(~far, -torch.inf)
    weights = mixer.linear_weights(head, q[rows].to(dtype), k[:, head].to(dtype), delay).sum(-1)
    largest = scores.amax(-1, keepdim=True)
    approximate = weights * (-largest[..., 0]).exp() / (scores - largest).exp().sum(-1)
    fitted = (share.sum(-1) * approximate).sum(-1) / (approximate**2).sum(-1).clamp(min=1e-20)
    mixer.log_scale[queries] = fitted.clamp(1e-4, 1e4).log()


def _k_means(points: Tensor, centres: int, seed: int, steps: int = 10) -> Tensor:
    """(n, d) -> (centres, d) by Lloyd's algorithm from random points."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator)
    chosen = points[order[torch.arange(centres) % len(points)]].clone()
    for _ in range(steps):
        nearest = torch.cdist(points, chosen).argmin(-1)
        member = torch.nn.functional.one_hot(nearest, centres).to(points.dtype)
        count = member.sum(0)[:, None]
        chosen = torch.where(count > 0, member.T @ points / count.clamp(min=1), chosen)
    return chosen


def _mean_rotation(x: Tensor, rotation: tuple[Tensor, float], near: float, far: float) -> Tensor:
    """x (F, d) turned as a query is against a key `near` to `far` tokens back, averaged over these distances."""
    frequencies, factor = rotation  # the factor is on queries and on keys
    angle = torch.linspace(near, far, 256)[:, None] * frequencies.float()
    cos, sin = (torch.cat([f(angle).mean(0) * factor**2] * 2) for f in (torch.cos, torch.sin))
    return turn(x, cos, sin)
