"""The start of Hedgehog layers with prototype features, in closed form: how fast they forget, what their features are.

decay       ln 2 / (mean distance of the attention that lies beyond the window), after Taylor-Calibrate (2026).
prototypes  k-means centres c_f of the queries before rotation; the key map is c_f turned by the mean rotation over
            the distances beyond the window (fast channels average out), the query map the soft assignment to centres.
scale       per query head, least squares between the true and the approximated share of the mass beyond the window.

B = 1 sequence of T tokens, H query heads, Hk kv heads, d head_dim, n rows (query positions sampled), F prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .observe import Observed, observe, sample_rows

if TYPE_CHECKING:
    from ...zoo.core.heads import RecurrentForCausalLM
    from ..data import PackedTokens

__all__ = ["fit_features", "fit_head"]


@torch.no_grad()
def fit_features(
    student: RecurrentForCausalLM,
    twin: RecurrentForCausalLM,
    data: PackedTokens,
    seed: int,
    only: Container[int] | None = None,
) -> None:
    """Sets prototypes, decay and scale of Hedgehog layers (those in `only`; None: all) in place, from one sequence."""
    from ...zoo.hedgehog.modeling_hedgehog import HedgehogMixer

    ids = data[0]["input_ids"]
    layers = observe(twin, ids, False, seed)
    rotation = twin.model.rotary.get(torch.arange(len(ids)))
    for number, (block, layer) in enumerate(zip(student.model.layers, layers, strict=True)):
        mixer = block.mixer
        chosen = only is None or number in only
        if chosen and isinstance(mixer, HedgehogMixer) and mixer.prototypes and mixer.features:
            for head in range(layer.k.shape[1]):
                fit_head(mixer, layer, head, rotation, seed)


def fit_head(mixer, layer: Observed, head: int, rotation: tuple[Tensor, float], seed: int) -> None:
    """Sets prototypes, decay and scale of one kv head of a mixer, in place; see the head of this file.

    Args:
        mixer: a HedgehogMixer with prototypes; its `lengths`, `sinks` and `features` say what is fitted.
        rotation: frequencies and factor, as `Rotary.get` gives them.
    """
    time, kv_heads, width = layer.k.shape
    groups = layer.q.shape[1] // kv_heads
    queries = slice(head * groups, (head + 1) * groups)
    window, sinks = mixer.lengths[head], mixer.sinks
    rows = sample_rows(time, seed)
    rows = rows[rows >= window + sinks]
    if not len(rows):
        return
    distance = rows[:, None] - torch.arange(time)[None]
    far = (distance >= window) & (torch.arange(time)[None] >= sinks)
    scores = torch.einsum("nhd,td->hnt", layer.turned_q[rows, queries], layer.turned_k[:, head]) * width**-0.5
    scores = scores.masked_fill(distance < 0, -torch.inf)
    share = torch.where(far, scores.softmax(-1), 0.0)
    mean_distance = float((share * distance).sum() / share.sum().clamp(min=1e-20)) - window
    half_life = max(mean_distance, 16.0)
    log_decay = -math.log(2) / half_life

    centres = _k_means(layer.q[rows, queries].flatten(0, 1), mixer.features, seed)
    key_map = _mean_rotation(centres, rotation, window, min(time, window + 2 * half_life)) * width**-0.5
    temperature = width**-0.5
    mixer.key_map[head] = key_map.T
    mixer.query_map[queries] = 2 * temperature * centres.T
    mixer.query_bias[queries] = -temperature * (centres**2).sum(-1)
    mixer.log_decay[head] = log_decay

    mixer.log_scale[queries] = 0.0
    features_q = mixer._query_features(_in_place(layer.q[rows], mixer))[0][:, queries]
    features_k = mixer._key_features_of(head, layer.k[:, head].to(mixer.key_map.dtype))
    decay = (log_decay * (distance - window).clamp(min=0)).exp()
    largest = scores.amax(-1, keepdim=True)
    total = (scores - largest).exp().sum(-1)
    approximate = torch.einsum("nhf,tf->hnt", features_q.float(), features_k.float()) * decay * far
    approximate = (approximate.sum(-1) * (-largest[..., 0]).exp()) / total
    true = share.sum(-1)
    fitted = (true * approximate).sum(-1) / (approximate**2).sum(-1).clamp(min=1e-20)
    mixer.log_scale[queries] = fitted.clamp(1e-4, 1e4).log()


def _in_place(q: Tensor, mixer) -> Tensor:
    return q[None].to(mixer.query_map.dtype)


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
    turned = x[..., : len(cos)]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, x[..., len(cos) :]], -1)
