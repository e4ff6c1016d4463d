"""Attention to a bounded number of tokens: every backend is the loop, and the loop is the definition."""

from __future__ import annotations

import random

import pytest
import torch

from rnnzoo.kernels.block_floating_point import quantise
from rnnzoo.kernels.bounded_attention import BoundedState, Bounds, bounded_attention, bounded_step, kept_until
from rnnzoo.kernels.dispatch import use_backend
from rnnzoo.kernels.errors import ShapeError

FIELDS = ("k", "v", "score", "position", "count")


def case(seed: int, dtype: torch.dtype, plain: bool = False) -> tuple[dict, dict]:
    """Tensors and settings of random sizes; plain: one document, no padding."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    batch, time, kv_heads, group = rng.randint(1, 3), rng.randint(1, 40), rng.randint(1, 3), rng.randint(1, 3)
    width, value_width = rng.choice([4, 6, 32]), rng.choice([4, 8])
    capacities = tuple(rng.randint(1, 9) for _ in range(kv_heads))
    recents = tuple(rng.randint(1, capacity) for capacity in capacities)
    bounds = Bounds(capacities, recents, rng.randint(0, 3), rng.choice([None, max(recents) + rng.randint(0, 6)]))
    tensors = {
        "q": torch.randn(batch, time, kv_heads * group, width, dtype=dtype),
        "k": torch.randn(batch, time, kv_heads, width, dtype=dtype),
        "v": torch.randn(batch, time, kv_heads, value_width, dtype=dtype),
        "score": torch.randn(batch, time, kv_heads),
    }
    if seed % 2:
        tensors["score"] = tensors["score"].mul(2).round()  # equal ones
    if rng.random() < 0.5:
        tensors["q_sink"] = torch.randn_like(tensors["q"])
    about = {"bounds": bounds}
    if not plain:
        about["seq_ids"] = rng.choice([None, (torch.rand(batch, time) < 0.1).cumsum(1)])
        about["mask"] = rng.choice([None, torch.rand(batch, time) < 0.8])
    return tensors, about


def same_states(a: BoundedState, b: BoundedState, tolerance: float) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(30))
def test_every_backend_is_the_loop(seed):
    dtype = (torch.float64, torch.float32)[seed % 3 == 0]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    tensors, about = case(seed, dtype)
    expected, after = bounded_attention(**tensors, **about, backend="reference")
    mask = about["mask"] if about["mask"] is not None else torch.ones(expected.shape[:2], dtype=torch.bool)
    for backend in ("chunked", "cpu"):  # in C: which tokens are kept
        with use_backend(backend):
            o, state = bounded_attention(**tensors, **about)
        torch.testing.assert_close(o[mask], expected[mask], rtol=tolerance, atol=tolerance)
        same_states(state, after, tolerance)


@pytest.mark.parametrize("seed", range(20))
def test_token_by_token_in_place_and_in_two_parts_equal_the_whole(seed):
    tensors, about = case(seed, torch.float32, plain=True)
    whole, after = bounded_attention(**tensors, **about)
    batch, time, _ = tensors["score"].shape
    widths = tensors["k"].shape[-1], tensors["v"].shape[-1]
    for backend in ("cpu", "chunked", "reference"):
        state = BoundedState.zeros(batch, about["bounds"], *widths)
        for t in range(time):
            o = bounded_step(**{name: x[:, t] for name, x in tensors.items()}, state=state, **about, backend=backend)
            torch.testing.assert_close(o, whole[:, t], rtol=1e-4, atol=1e-4)
        same_states(state, after, 1e-4)
    outputs, state, cut = [], None, time // 3
    for part in (slice(0, cut), slice(cut, time)):
        if part.stop > part.start:
            some = {name: x[:, part] for name, x in tensors.items()}
            o, state = bounded_attention(**some, **about, initial_state=state)
            outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-4)
    same_states(state, after, 1e-4)


@pytest.mark.parametrize("bits", [(8, 4), (4, 8)])
def test_a_state_of_few_bits_keeps_what_was_rounded(bits):
    torch.manual_seed(0)
    bounds = Bounds((7, 5), (3, 1), 2)
    q, k, v = torch.randn(2, 40, 4, 32), torch.randn(2, 40, 2, 32), torch.randn(2, 40, 2, 64)
    score = torch.randn(2, 40, 2)
    k, v = quantise(k, bits[0]), quantise(v, bits[1])
    whole, after = bounded_attention(q, k, v, score, bounds=bounds)
    state = BoundedState.zeros(2, bounds, 32, 64, bits=bits)
    for t in range(40):
        o = bounded_step(q[:, t], k[:, t], v[:, t], score[:, t], state, bounds=bounds)
        torch.testing.assert_close(o, whole[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.keys(torch.float32), after.k, rtol=0, atol=0)
    torch.testing.assert_close(state.values(torch.float32), after.v, rtol=0, atol=0)


def test_what_is_kept_are_sinks_the_last_tokens_and_the_largest_scores():
    torch.manual_seed(3)
    score = torch.randn(2, 60, 2).bfloat16()
    bounds = Bounds((12, 7), (4, 7), 2)
    until = kept_until(score, bounds)
    step = torch.arange(60)
    for b in range(2):
        for h, (capacity, recent) in enumerate(zip(bounds.capacities, bounds.recents, strict=True)):
            for t in range(60):
                kept = set(step[(step <= t) & (until[b, :, h] > t)].tolist())
                last = set(range(max(0, t - recent + 1), t + 1))
                others = list(range(2, t - recent + 1))
                best = sorted(others, key=lambda j: (float(score[b, j, h]), j), reverse=True)[: capacity - recent]
                first = {j for j in (0, 1) if j <= t}
                assert kept == first | {j for j in last if j >= 2} | set(best)


def test_without_scores_it_is_a_window():
    bounds = Bounds((6,), (2,), 1)
    until = kept_until(torch.zeros(1, 30, 1), bounds)[0, :, 0]
    assert until[0] == 30  # the sink
    assert (until[1:] - torch.arange(1, 30)).clamp(max=6).tolist() == [min(6, 30 - t) for t in range(1, 30)]


def test_gradients_are_those_of_finite_differences():
    tensors, about = case(8, torch.float64)
    names = [name for name in tensors if name != "score"]
    given = [tensors[name].requires_grad_() for name in names]

    def outputs(*values):
        o, state = bounded_attention(**dict(zip(names, values, strict=True)), score=tensors["score"], **about)
        return o, state.k, state.v

    assert torch.autograd.gradcheck(outputs, given)


def test_what_does_not_fit_is_said():
    tensors, about = case(4, torch.float32, plain=True)
    with pytest.raises(ShapeError, match="score has shape"):
        bounded_attention(**(tensors | {"score": tensors["score"][:, :, :0]}), **about)
    with pytest.raises(ValueError, match="recents must lie between 1 and capacities"):
        Bounds((4,), (5,))


def test_many_sinks_are_more_than_the_c_code_takes():
    torch.manual_seed(0)
    bounds = Bounds((3,), (2,), 200)
    q, k, v, score = (
        torch.randn(1, 210, 1, 4),
        torch.randn(1, 210, 1, 4),
        torch.randn(1, 210, 1, 4),
        torch.randn(1, 210, 1),
    )
    whole, state = bounded_attention(q[:, :209], k[:, :209], v[:, :209], score[:, :209], bounds=bounds)
    o = bounded_step(q[:, 209], k[:, 209], v[:, 209], score[:, 209], state, bounds=bounds)
    expected, _ = bounded_attention(q, k, v, score, bounds=bounds)
    torch.testing.assert_close(o, expected[:, 209], rtol=1e-4, atol=1e-4)
    assert whole.isfinite().all()
