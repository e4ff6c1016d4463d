"""The window of gated linear attention: against a dense softmax, against the loop, split, packed and masked."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.kernels.gated_linear_attention import Window, WindowState, gated_linear_attention, ring_positions

from .windows import Layer, assert_close, flat

repeatable = settings(derandomize=True, deadline=None, max_examples=25)
BACKENDS = ["reference", "chunked"]


window_lengths = st.lists(st.sampled_from([1, 2, 8, 33, 70, 300]), min_size=1, max_size=3).map(tuple)
sizes = st.sampled_from([1, 2, 5, 63, 64, 65, 100])


@repeatable
@given(
    seed=st.integers(0, 1000),
    time=sizes,
    lengths=window_lengths,
    group=st.integers(1, 3),
    width=st.sampled_from([0, 1, 4]),
    sinks=st.sampled_from([0, 1, 4]),
    anchor=st.sampled_from(["absolute", "max"]),
    packed=st.sampled_from([0.0, 0.04, 0.5]),
    masked=st.booleans(),
    continued=st.booleans(),
)
def test_chunked_equals_the_loop(seed, time, lengths, group, width, sinks, anchor, packed, masked, continued):
    layer = Layer(seed, 2, time, lengths, group, width, sinks, anchor)
    options, leaves = {}, layer.leaves()
    if packed:
        options["seq_ids"] = (torch.rand(2, time) < packed).cumsum(1)
    if masked:
        options["mask"] = torch.rand(2, time) < 0.7
    if continued:
        before = Layer(seed + 1, 2, 40, lengths, group, width, sinks, anchor)
        _, state = before.run(mask=torch.rand(2, 40) < [0.9, 0.1][seed % 2], backend="reference")
        tensors = {
            field.name: getattr(state, field.name).detach().clone() for field in fields(state) if field.name != "count"
        }
        leaves += [x.requires_grad_() for x in tensors.values()]
        features = torch.rand(2, sum(lengths), width, dtype=torch.float64).requires_grad_()
        leaves.append(features)
        options |= {"state": WindowState(**tensors, count=state.count), "ring_features": features}
    expected = layer.run(**options, backend="reference")
    found = layer.run(**options, backend="chunked")
    assert_close(found, expected)
    # Rows that hold no token have a value, zero, but no meaningful gradient: compare the others.
    used = [x.detach() != 0 for x in flat(expected)]
    found, expected = (
        [x * keep for x, keep in zip(flat(result), used, strict=True) if x.is_floating_point()]
        for result in (found, expected)
    )
    torch.manual_seed(1)
    weights = [torch.randn(x.shape, dtype=x.dtype) for x in found]
    pair = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(xs, weights, strict=True)), leaves, allow_unused=True)
        for xs in (found, expected)
    ]
    for leaf, a, b in zip(leaves, *pair, strict=True):
        a, b = (torch.zeros_like(leaf) if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def dense_softmax(layer, time, starts):
    """Softmax attention with a (time, time) mask, one head at a time, with no code of the kernels."""
    x = layer.over_time
    group = x["wq"].shape[2] // len(layer.lengths)
    steps = torch.arange(time)
    outputs = []
    for head in range(x["wq"].shape[2]):
        length = layer.lengths[head // group]
        now, past = steps[:, None], steps[None]
        same = past >= starts[:, None]
        sink = same & (past < starts[:, None] + layer.sinks) & (past <= now)
        near = same & (past <= now) & (past > now - length) & ~sink
        keys = x["wk"][:, :, head // group].transpose(1, 2) / 2  # the key width is 4
        scores = torch.where(sink, x["q_sink"][:, :, head] @ keys, x["wq"][:, :, head] @ keys)
        weights = scores.masked_fill(~(sink | near), -torch.inf).softmax(-1)
        outputs.append(weights @ x["v"][:, :, head // group])
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("lengths", [(1,), (8, 8), (3, 64, 17), (200,), (65, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_without_linear_part_a_window_is_masked_softmax_attention(lengths, sinks, backend, packed):
    time = 90
    layer = Layer(0, 2, time, lengths, 2, 0, sinks)
    starts, options = torch.zeros(time, dtype=torch.int64), {}
    if packed:
        edges = torch.tensor([0, 3, 4, 40, 77])
        ids = (torch.arange(time)[:, None] >= edges).sum(1)
        starts, options = edges[ids - 1], {"seq_ids": ids.expand(2, -1)}
    expected = dense_softmax(layer, time, starts)
    o, _ = layer.run(backend=backend, **options)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-9)
    leaves = [layer.over_time[name] for name in ("wq", "wk", "v", "q_sink")]
    weights = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True) for y in (o, expected))
    for leaf, a, b in zip(leaves, found, wanted, strict=True):
        a = torch.zeros_like(leaf) if a is None else a
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("anchor", ["absolute", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_beyond_window_and_sinks_is_in_the_linear_part_under_one_denominator(anchor, backend):
    time, sinks = 30, 2
    layer = Layer(0, 1, time, (5, 9), 2, 4, sinks, anchor)
    o, _ = layer.run(backend=backend)
    x, g, factor = layer.over_time, layer.constant["g"], layer.constant["factor"]
    for head in range(4):
        length = layer.lengths[head // 2]
        for t in range(time):
            exact = [j for j in range(t + 1) if j < sinks or j > t - length]
            rest = [j for j in range(t + 1) if j not in exact]
            scores = torch.stack(
                [(x["q_sink"] if j < sinks else x["wq"])[0, t, head] @ x["wk"][0, j, head // 2] / 2 for j in exact]
            )
            if anchor == "max":
                scores = scores - scores.max()
            weights = [factor[head] * score.exp() for score in scores]
            for j in rest:
                decayed = (g[head // 2] * (t - length - j)).exp() * x["k"][0, j, head // 2]
                weights.append(x["q"][0, t, head] @ decayed)
            weights = torch.stack(weights)
            expected = weights @ x["v"][0, exact + rest, head // 2] / weights.sum()
            torch.testing.assert_close(o[0, t, head], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("anchor", ["absolute", "max"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_gradients_are_those_of_finite_differences(anchor, sinks):
    layer = Layer(0, 1, 7, (2, 3), 2, 2, sinks, anchor)
    names = [*layer.over_time, *layer.constant]

    def run(*tensors):
        values = dict(zip(names, tensors, strict=True))
        layer.over_time = {name: values[name] for name in layer.over_time}
        layer.constant = {name: values[name] for name in layer.constant}
        o, state = layer.run(backend="chunked", seq_ids=torch.tensor([[0, 0, 0, 0, 0, 1, 1]]))
        return o, state.s

    assert torch.autograd.gradcheck(run, tuple(layer.leaves()))


@repeatable
@given(
    seed=st.integers(0, 1000),
    time=st.sampled_from([3, 30, 70, 130]),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    lengths=window_lengths,
    width=st.sampled_from([0, 3]),
    sinks=st.sampled_from([0, 4]),
    anchor=st.sampled_from(["absolute", "max"]),
    masked=st.booleans(),
)
def test_whole_equals_parts_split_anywhere(seed, time, cuts, lengths, width, sinks, anchor, masked):
    layer = Layer(seed, 2, time, lengths, 2, width, sinks, anchor)
    mask = torch.rand(2, time) < 0.7 if masked else torch.ones(2, time, dtype=torch.bool)
    with torch.no_grad():
        whole = layer.run(mask=mask)
        edges = sorted({0, time, *(round(cut * time) for cut in cuts)})
        assert_close(in_parts(layer, edges, mask), whole)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [0, 3])
def test_whole_equals_token_by_token(width, masked):
    time = 45
    layer = Layer(0, 2, time, (3, 20, 8), 2, width, 4)
    mask = torch.rand(2, time) < 0.7 if masked else torch.ones(2, time, dtype=torch.bool)
    with torch.no_grad():
        assert_close(in_parts(layer, range(time + 1), mask), layer.run(mask=mask))


def in_parts(layer, edges, mask):
    state, outputs, seen = None, [], [[], []]
    for first, stop in pairwise(edges):
        features = None if state is None else layer.features_in_rings(state.count, seen)
        o, state = layer.run(lambda x: x[:, first:stop], state, features, mask=mask[:, first:stop])  # noqa: B023
        outputs.append(o)
        for row in range(2):
            seen[row] += [step for step in range(first, stop) if mask[row, step]]
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_separate_ones(backend):
    sizes = [5, 1, 40, 2, 70]
    layer = Layer(0, 1, sum(sizes), (4, 20), 2, 3, 2)
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))[None]
    o, state = layer.run(seq_ids=ids, backend=backend)
    first = 0
    for size in sizes:
        alone = layer.run(lambda x: x[:, first : first + size], backend=backend)  # noqa: B023
        torch.testing.assert_close(o[:, first : first + size], alone[0], rtol=1e-9, atol=1e-9)
        first += size
    assert_close((alone[0], state), alone)


@pytest.mark.parametrize("where", ["left", "inside", "right", "everywhere"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_are_as_if_removed_whatever_they_hold(where, backend):
    time = 50
    layer = Layer(0, 1, time, (4, 20), 2, 3, 2)
    mask = torch.ones(1, time, dtype=torch.bool)
    if where == "everywhere":
        mask[:] = False
    else:
        mask[:, {"left": slice(0, 9), "inside": slice(10, 35), "right": slice(41, None)}[where]] = False
    layer.over_time = {name: torch.where(mask[..., None, None], x, torch.nan) for name, x in layer.over_time.items()}
    ids = torch.where(torch.arange(time) < 30, 0, 1)[None]
    o, state = layer.run(mask=mask, seq_ids=ids, backend=backend)
    assert (o[~mask] == 0).all()
    if where == "everywhere":
        assert state.count.item() == 0 and not state.s.any() and not state.ring_k.any()
        return
    expected = layer.run(lambda x: x[mask][None], seq_ids=ids[mask][None], backend=backend)
    assert_close((o[mask][None], state), expected)


@pytest.mark.parametrize("step_mask", [[True, True], [True, False], [False, False]])
def test_one_masked_token_leaves_its_row_as_it_was(step_mask):
    layer = Layer(0, 2, 21, (4, 9), 2, 3, 2)
    with torch.no_grad():
        _, state = layer.run(lambda x: x[:, :20])
        features = layer.features_in_rings(state.count, [list(range(20))] * 2)
        one = {"state": state, "ring_features": features, "mask": torch.tensor(step_mask)[:, None]}
        found = layer.run(lambda x: x[:, 20:], **one, backend="chunked")
        assert_close(found, layer.run(lambda x: x[:, 20:], **one, backend="reference"))
    for row, valid in enumerate(step_mask):
        assert found[1].count[row] == 20 + valid
        assert valid or not found[0][row].any()


@pytest.mark.parametrize("width", [24, 60, 64])
def test_bfloat16_and_float32_are_close_to_float64(width):
    """9 heads on 3 key heads, as in SmolLM2; windows that end inside and outside of blocks."""
    time, lengths, kv_heads = 300, (16, 64, 200), 3
    torch.manual_seed(0)
    q, wq, q_sink = torch.rand(1, time, 9, 8), torch.randn(1, time, 9, width), torch.randn(1, time, 9, width)
    k, wk, v = torch.rand(1, time, 3, 8), torch.randn(1, time, 3, width), torch.randn(1, time, 3, width)
    g = torch.full((kv_heads,), -0.02)

    def run(dtype):
        tensors = [x.to(dtype).requires_grad_() for x in (q, k, v, wq, wk, q_sink)]
        window = Window(tensors[3], tensors[4], lengths, 4, tensors[5])
        o, state = gated_linear_attention(*tensors[:3], g.to(dtype), window=window)
        assert o.dtype == dtype and state.ring_k.dtype == dtype
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
        return [o, state.s, *torch.autograd.grad((o * weights.to(dtype)).sum(), tensors)]

    exact = run(torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        for found, expected in zip(run(dtype), exact, strict=True):
            assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-100.0, 0.0, 300.0])
def test_scores_of_any_size_give_finite_weights(backend, offset):
    """A constant added to all scores changes a window without linear part in nothing."""
    torch.manual_seed(0)
    wq, wk, v = torch.randn(1, 12, 1, 4), torch.randn(1, 12, 1, 4), torch.randn(1, 12, 1, 3)
    empty = torch.zeros(1, 12, 1, 0)
    raised = (
        torch.cat([wq, torch.ones_like(wq[..., :1])], -1),
        torch.cat([wk, torch.full_like(wk[..., :1], offset)], -1),
    )
    plain, _ = gated_linear_attention(empty, empty, v, window=Window(wq, wk, (4,), scale=1.0), backend=backend)
    moved, _ = gated_linear_attention(empty, empty, v, window=Window(*raised, (4,), scale=1.0), backend=backend)
    torch.testing.assert_close(moved, plain, rtol=1e-3, atol=1e-3)


def test_the_backward_keeps_nothing_of_size_time_times_window():
    time, length = 512, 256
    kept = []
    layer = Layer(0, 1, time, (length,), 1, 2, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        layer.run()
    assert max(kept) <= time * 64


def test_ring_positions_say_which_token_each_row_holds():
    held = ring_positions(torch.tensor([0, 2, 7]), (1, 3))
    assert held[0].tolist() == [-1, -3, -2, -1]  # nothing yet
    assert held[1].tolist() == [1, 0, 1, -1]
    assert held[2].tolist() == [6, 6, 4, 5]


def test_zeros_is_the_state_before_the_first_token():
    layer = Layer(0, 2, 10, (3, 5), 1, 2, 2)
    zeros = WindowState.zeros(2, (3, 5), 2, 4, 2, 3, torch.float64)
    assert_close(layer.run(state=zeros, ring_features=torch.zeros(2, 8, 2, dtype=torch.float64)), layer.run())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": (4,)}, ShapeError, r"window.lengths is \(4,\); expected 2 integers of at least 1"),
        ({"lengths": (4, 0)}, ShapeError, "at least 1"),
        ({"sinks": -1}, ShapeError, "window.sinks is -1"),
        ({"anchor": "min"}, RnnzooError, "window.anchor is 'min'"),
        ({"q": torch.zeros(1, 5, 3, 4)}, ShapeError, r"window.q has shape \(1, 5, 3, 4\); expected \(1, 5, 4, 4\)"),
        ({"k": torch.zeros(1, 5, 2, 3)}, ShapeError, r"window.k has shape \(1, 5, 2, 3\); expected \(1, 5, 2, 4\)"),
        ({"q_sink": torch.zeros(1, 5, 4, 3)}, ShapeError, "window.q_sink has shape"),
        ({"factor": torch.ones(2)}, ShapeError, r"window.factor has shape \(2,\); expected \(4,\)"),
        ({"g": torch.zeros(1, 5, 2, 1)}, ShapeError, r"g has shape .*; with a window expected a constant decay \(2,\)"),
        ({"bonus": torch.zeros(4, 3)}, RnnzooError, "bonus cannot be combined"),
        ({"initial_state": torch.zeros(1, 2, 3, 4)}, ShapeError, "expected a WindowState"),
        ({"initial_state": WindowState.zeros(1, (4, 6), 2, 4, 3, 3)}, ShapeError, "initial_state.ring_k has shape"),
        ({"initial_state": WindowState.zeros(1, (4, 5), 2, 4, 3, 3)}, ShapeError, "window.ring_features is None"),
    ],
)
def test_wrong_windows_are_named(change, error, message):
    window = {"q": torch.zeros(1, 5, 4, 4), "k": torch.zeros(1, 5, 2, 4), "lengths": (4, 5), "sinks": 2}
    window |= {name: value for name, value in change.items() if name not in ("g", "bonus", "initial_state")}
    call = {name: value for name, value in change.items() if name in ("g", "bonus", "initial_state")}
    q, k, v = torch.zeros(1, 5, 4, 3), torch.zeros(1, 5, 2, 3), torch.zeros(1, 5, 2, 3)
    with pytest.raises(error, match=message):
        gated_linear_attention(q, k, v, window=Window(**window), **call)
