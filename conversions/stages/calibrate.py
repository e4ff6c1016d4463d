"""Calibration of Hedgehog layers in closed form: where the state goes, how fast it forgets, what its features are.

Everything is measured on the attention twin of the teacher, layer by layer, on a few sequences:

  windows     for each kv head and candidate length w: E ||W_o (o_w - o)||^2, the error that cutting its attention to w
              tokens and the sinks leaves in the residual stream, times the mean squared gradient of the teacher's loss
              at that layer's output, so that layers are comparable. Windows grow greedily by error removed per byte.
  decay       ln 2 / (mean distance of the attention that lies beyond the window), after Taylor-Calibrate (2026).
  prototypes  k-means centres c_f of the queries before rotation; the key map is c_f turned by the mean rotation over
              the distances beyond the window (fast channels average out), the query map the soft assignment to centres.
  scale       per query head, least squares between the true and the approximated share of the mass beyond the window.

B = 1 sequence of T tokens, H query heads, Hk kv heads, d head_dim, n rows (query positions sampled), F prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.errors import RnnzooError

if TYPE_CHECKING:
    from ...zoo.core.modeling import RecurrentForCausalLM
    from ..data import PackedTokens

__all__ = ["Measured", "allocate", "fit_features", "measure_windows"]

CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
ROWS = 384
Progress = Callable[[int, int], None]


@dataclass
class Measured:
    """errors: (layers, Hk, candidates), the weighted error that each candidate window leaves."""

    errors: Tensor
    candidates: tuple[int, ...]


@dataclass
class _Layer:
    """What one attention layer saw: q (T, H, d) and k, v (T, Hk, d) before rotation, gradient at the layer's output."""

    q: Tensor
    k: Tensor
    v: Tensor
    turned_q: Tensor
    turned_k: Tensor
    gradient: Tensor
    output_weight: Tensor


def _observe(twin: RecurrentForCausalLM, ids: Tensor, with_gradient: bool, seed: int) -> list[_Layer]:
    """Runs the twin over ids (T,); the gradient is of the loss on labels drawn from its own predictions."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = []
    for block in twin.model.layers:
        hooks.append(block.mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())))
        hooks.append(block.mixer.proj.o_proj.register_forward_hook(lambda _, args, out: _keep(out, outputs)))
    try:
        embedded = twin.model.embed_tokens(ids[None]).detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            hidden = twin.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            if with_gradient:
                hidden.backward(_sampled_gradient(twin, hidden.detach()[0], seed)[None])
    finally:
        for hook in hooks:
            hook.remove()
    ctx = twin.model.make_context(1, len(ids), ids.device)
    layers = []
    with torch.no_grad():
        for block, hidden, output in zip(twin.model.layers, inputs, outputs, strict=True):
            q, k, v = block.mixer.proj.split(hidden)
            turned_q, turned_k = (ctx.rotary.rotate(x, ctx.positions) for x in (q, k))
            gradient = output.grad[0].float() if output.grad is not None else torch.ones_like(output[0]).float()
            heads = [x[0].float() for x in (q, k, v, turned_q, turned_k)]
            layers.append(_Layer(*heads, gradient, block.mixer.proj.o_proj.weight.float()))
    return layers


def _keep(output: Tensor, outputs: list[Tensor]) -> None:
    if output.requires_grad:
        output.retain_grad()
    outputs.append(output)


@torch.no_grad()
def _sampled_gradient(twin: RecurrentForCausalLM, hidden: Tensor, seed: int) -> Tensor:
    """Gradient at hidden (T, D) of the cross-entropy on labels drawn from the model: its square is the Fisher's."""
    generator = torch.Generator().manual_seed(seed)
    weight = twin.lm_head.weight
    gradient = torch.empty_like(hidden)
    for rows in torch.arange(len(hidden)).split(256):
        p = torch.softmax((hidden[rows] @ weight.T).float(), -1)
        level = torch.rand(len(rows), 1, generator=generator)
        drawn = torch.searchsorted(p.cumsum(-1), level).clamp(max=p.shape[-1] - 1)
        gradient[rows] = p.scatter_add(1, drawn, -torch.ones_like(level)).to(weight.dtype) @ weight
    return gradient


def measure_windows(
    twin: RecurrentForCausalLM, data: PackedTokens, sinks: int, seed: int, progress: Progress | None = None
) -> Measured:
    """The error of every candidate window for every kv head, averaged over the sequences of `data`."""
    candidates = tuple(w for w in CANDIDATES if w < data.seq_len)
    total: Tensor | None = None
    for number in range(len(data)):
        layers = _observe(twin, data[number]["input_ids"], True, seed + number)
        errors = torch.stack([_window_errors(layer, candidates, sinks, seed + number) for layer in layers])
        total = errors if total is None else total + errors
        if progress:
            progress((number + 1) * data.seq_len, data.num_tokens)
    assert total is not None
    return Measured(total / len(data), candidates)


@torch.no_grad()
def _window_errors(layer: _Layer, candidates: tuple[int, ...], sinks: int, seed: int) -> Tensor:
    """(Hk, candidates) of one layer and sequence."""
    time, kv_heads, width = layer.k.shape
    groups = layer.q.shape[1] // kv_heads
    rows = _sample_rows(time, seed)
    weight = float((layer.gradient**2).mean()) * layer.gradient.shape[-1]
    distance = rows[:, None] - torch.arange(time)[None]
    result = torch.zeros(kv_heads, len(candidates))
    for head in range(kv_heads):
        queries = slice(head * groups, (head + 1) * groups)
        scores = torch.einsum("nhd,td->hnt", layer.turned_q[rows, queries], layer.turned_k[:, head]) * width**-0.5
        scores = scores.masked_fill(distance < 0, -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        values = torch.cat([layer.v[:, head], torch.ones(time, 1)], -1)
        full = weights @ values
        full = full[..., :-1] / full[..., -1:]
        o_weight = layer.output_weight.unflatten(1, (-1, width))[:, queries]
        for i, window in enumerate(candidates):
            seen = (distance < window) | (torch.arange(time)[None] < sinks)
            cut = (weights * seen) @ values
            difference = cut[..., :-1] / cut[..., -1:] - full
            residual = torch.einsum("hnd,ohd->no", difference, o_weight)
            result[head, i] = (residual**2).sum(-1).mean() * weight
    return result


def _sample_rows(time: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = min(ROWS, time)
    return torch.randperm(time, generator=generator)[:count].sort().values


def allocate(measured: Measured, converted: list[int], slots: int) -> list[list[int]]:
    """Windows (layers, Hk) whose sum over the layers `converted` is at most `slots`; [] for the other layers.

    Greedy: the head and length with the most error removed per token of window, until the slots are spent.

    Raises:
        RnnzooError: the slots do not suffice for one token each.
    """
    kv_heads = measured.errors.shape[1]
    heads = [(layer, head) for layer in converted for head in range(kv_heads)]
    chosen = dict.fromkeys(heads, 0)
    spent = len(heads) * measured.candidates[0]
    if slots < spent:
        raise RnnzooError(
            f"The state budget leaves {slots} window tokens for {len(heads)} kv heads; give a larger one."
        )
    errors = measured.errors.tolist()
    while True:
        best = None
        for layer, head in heads:
            now = chosen[layer, head]
            for i in range(now + 1, len(measured.candidates)):
                cost = measured.candidates[i] - measured.candidates[now]
                if spent + cost > slots:
                    break
                gain = (errors[layer][head][now] - errors[layer][head][i]) / cost
                if gain > 0 and (best is None or gain > best[0]):
                    best = (gain, (layer, head), i, cost)
        if best is None:
            break
        _, where, i, cost = best
        chosen[where] = i
        spent += cost
    return [
        [measured.candidates[chosen[layer, head]] for head in range(kv_heads)] if layer in set(converted) else []
        for layer in range(measured.errors.shape[0])
    ]


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
    layers = _observe(twin, ids, False, seed)
    rotation = twin.model.rotary.get(torch.arange(len(ids)))
    for number, (block, layer) in enumerate(zip(student.model.layers, layers, strict=True)):
        mixer = block.mixer
        chosen = only is None or number in only
        if chosen and isinstance(mixer, HedgehogMixer) and mixer.prototypes and mixer.features:
            for head in range(layer.k.shape[1]):
                _fit_head(mixer, layer, head, rotation, seed)


def _fit_head(mixer, layer: _Layer, head: int, rotation: tuple[Tensor, float], seed: int) -> None:
    time, kv_heads, width = layer.k.shape
    groups = layer.q.shape[1] // kv_heads
    queries = slice(head * groups, (head + 1) * groups)
    window, sinks = mixer.lengths[head], mixer.config.num_sinks
    rows = _sample_rows(time, seed)
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
        for i in range(centres):
            if bool((nearest == i).any()):
                chosen[i] = points[nearest == i].mean(0)
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
