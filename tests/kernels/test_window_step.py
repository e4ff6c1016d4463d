"""One token through the window, in place: as the whole call gives it, for every kind of ring."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnzoo.kernels.block_floating_point import pack, quantise
from rnnzoo.kernels.errors import ShapeError
from rnnzoo.kernels.gated_linear_attention import Window, WindowState, gated_linear_attention, ring_positions
from rnnzoo.kernels.window_step import window_step

sampled = st.sampled_from


def tokens(time: int, batch: int, kv_heads: int, group: int, width: int, features: int, dtype=torch.float64) -> dict:
    heads = kv_heads * group
    return {
        "near": torch.randn(batch, time, heads, width, dtype=dtype),
        "far": torch.randn(batch, time, heads, width, dtype=dtype),
        "k": torch.randn(batch, time, kv_heads, width, dtype=dtype),
        "v": torch.randn(batch, time, kv_heads, width, dtype=dtype),
        "q": torch.rand(batch, time, heads, features, dtype=dtype),
        "features": torch.rand(batch, time, kv_heads, features, dtype=dtype),
    }


def empty(batch: int, lengths: tuple[int, ...], sinks: int, width: int, features: int, bits, dtype) -> WindowState:
    state = WindowState.zeros(batch, lengths, sinks, width, features, width, dtype)
    state.s = state.s.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for names, count in zip((("ring_k", "sink_k"), ("ring_v", "sink_v")), bits or (), strict=False):
        for name in names:
            setattr(state, name, pack(getattr(state, name), count))
    return state


def decode(x: dict, state: WindowState, lengths, sinks, backend, **options) -> torch.Tensor:
    """All tokens one by one; the features of what leaves are looked up by position."""
    outputs = []
    rows = torch.arange(len(state.count))
    for t in range(x["k"].shape[1]):
        heads = [x["features"][rows, (state.count - length).clamp(min=0), head] for head, length in enumerate(lengths)]
        one = {name: x[name][:, t] for name in ("q", "near", "far", "k", "v")}
        outputs.append(
            window_step(
                **one,
                state=state,
                lengths=lengths,
                sinks=sinks,
                leaving=torch.stack(heads, 1),
                backend=backend,
                **options,
            )
        )
    return torch.stack(outputs, 1)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    lengths=sampled([(1,), (3, 8), (40, 2, 129), (300,)]),
    sinks=sampled([0, 4]),
    width=sampled([8, 24, 64]),
    bits=sampled([None, (8, 4), (4, 8), (8, 8)]),
    anchor=sampled(["absolute", "max"]),
    backend=sampled(["cpu", "chunked", "reference"]),
)
def test_token_by_token_in_place_equals_the_whole(seed, lengths, sinks, width, bits, anchor, backend):
    torch.manual_seed(seed)
    time, batch, group, features = 50 if max(lengths) < 100 else 310, 2, 3, 5
    exact = backend != "cpu"
    x = tokens(time, batch, len(lengths), group, width, features)
    if bits is not None:
        x["k"], x["v"] = quantise(x["k"], bits[0]), quantise(x["v"], bits[1])
    g, factor = -torch.rand(len(lengths), dtype=torch.float64) / 10, torch.rand(group * len(lengths)).double() + 0.5
    window = Window(x["near"], x["k"], lengths, sinks, x["far"], factor=factor, anchor=anchor)
    whole, final = gated_linear_attention(
        x["q"], x["features"], x["v"], g, window=window, backend="reference" if time < 100 else "chunked"
    )
    dtype = torch.float64 if exact else torch.float32
    x, g, factor = {name: value.to(dtype) for name, value in x.items()}, g.to(dtype), factor.to(dtype)
    state = empty(batch, lengths, sinks, width, features, bits, dtype)
    parts = decode(x, state, lengths, sinks, backend, g=g, factor=factor, anchor=anchor)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(parts.double(), whole, **tolerance)
    torch.testing.assert_close(state.s.double(), final.s, **tolerance)
    assert torch.equal(state.count, final.count)
    filled = (ring_positions(state.count, lengths) >= 0)[..., None]
    for name in ("ring_k", "ring_v", "sink_k", "sink_v"):
        ring, expected = getattr(state, name), getattr(final, name)
        ring = ring if isinstance(ring, torch.Tensor) else ring.unpack(dtype)
        assert torch.equal(ring * (filled if "ring" in name else 1), expected.to(dtype)), name


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), width=sampled([8, 24, 60, 64]), bits=sampled([(8, 4), (4, 8)]))
def test_what_c_packs_is_what_torch_packs(seed, width, bits):
    torch.manual_seed(seed)
    x = tokens(9, 2, 2, 1, width, 3, torch.float32)
    x["k"], x["v"] = (torch.ldexp(x[n], torch.randint(-40, 40, (2, 9, 2, 1))) for n in "kv")
    x["v"][:, 3] = 0
    lengths = (9, 20)
    by_torch, by_c = (empty(2, lengths, 2, width, 3, bits, torch.float32) for _ in range(2))
    with torch.no_grad():
        decode(x, by_torch, lengths, 2, "chunked")
        decode(x, by_c, lengths, 2, "cpu")
    for name in ("ring_k", "ring_v", "sink_k", "sink_v"):
        a, b = getattr(by_torch, name), getattr(by_c, name)
        assert torch.equal(a.codes, b.codes) and torch.equal(a.exponents, b.exponents), name


def test_one_thread_or_two_and_every_run_give_the_same():
    torch.manual_seed(0)
    lengths, threads = (300, 40), torch.get_num_threads()
    x = tokens(60, 1, 2, 3, 64, 8, torch.float32)
    start = empty(1, lengths, 4, 64, 8, (8, 4), torch.float32)
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(decode(x, copy.deepcopy(start), lengths, 4, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_a_wrong_shape_is_named():
    x = {name: value[:, 0] for name, value in tokens(1, 1, 2, 1, 8, 3, torch.float32).items()}
    state = empty(1, (4, 4), 0, 8, 3, None, torch.float32)
    with pytest.raises(ShapeError, match=r"k has shape \(1, 1, 8\); expected \(1, 2, 8\)"):
        window_step(x["q"], x["near"], x["k"][:, :1], x["v"], state, lengths=(4, 4))
