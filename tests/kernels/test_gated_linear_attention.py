"""Gated linear attention without a window: the chunked backend against the equation, and what resets and masks mean."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnzoo.kernels.dispatch import backends, explain
from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.kernels.gated_linear_attention import Window, gated_linear_attention, gated_linear_attention_step

repeatable = settings(derandomize=True, deadline=None, max_examples=25)
lengths = st.sampled_from([1, 2, 17, 63, 64, 65, 100])


def make(seed, batch, time, kv_heads, group, width, value_width, decay, strength, *, dtype=torch.float64, state=True):
    """Keyword arguments of a call with every floating tensor a leaf."""
    torch.manual_seed(seed)
    heads = kv_heads * group

    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    call = {
        "q": leaf(batch, time, heads, width),
        "k": leaf(batch, time, kv_heads, width),
        "v": leaf(batch, time, kv_heads, value_width),
    }
    shape = {
        "constant": (kv_heads,),
        "head": (batch, time, kv_heads, 1),
        "channel": (batch, time, kv_heads, width),
    }.get(decay)
    if shape is not None:
        call["g"] = (-strength * torch.rand(*shape, dtype=dtype)).requires_grad_()
    if state:
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        call["initial_state"] = torch.randn(batch, kv_heads, width, value_width, dtype=state_dtype).requires_grad_()
    return call


def packing(seed, batch, time, packed, masked):
    generator = torch.Generator().manual_seed(seed)
    options = {}
    if packed:
        options["seq_ids"] = (torch.rand(batch, time, generator=generator) < packed).cumsum(1)
    if masked:
        options["mask"] = torch.rand(batch, time, generator=generator) < 0.7
    return options


def gradients(outputs, leaves):
    torch.manual_seed(1)
    loss = sum((x * torch.randn(x.shape).to(x.dtype)).sum() for x in outputs)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def assert_backends_agree(call, tolerance, **options):
    leaves = [x for x in [*call.values(), options.get("bonus")] if x is not None]
    expected = gated_linear_attention(**call, **options, backend="reference")
    found = gated_linear_attention(**call, **options, backend="chunked")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        scale = max(1.0, b.abs().max().item() if b.numel() else 1.0)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


@repeatable
@given(
    seed=st.integers(0, 1000),
    time=lengths,
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    width=st.sampled_from([0, 1, 5]),
    decay=st.sampled_from(["none", "constant", "head", "channel"]),
    strength=st.sampled_from([0.1, 2.0, 50.0]),
    flavour=st.sampled_from(["plain", "bonus", "normalize"]),
    state=st.booleans(),
    packed=st.sampled_from([0.0, 0.05, 0.5]),
    masked=st.booleans(),
)
def test_chunked_equals_the_loop_in_float64(
    seed, time, kv_heads, group, width, decay, strength, flavour, state, packed, masked
):
    value_width = 3
    call = make(seed, 2, time, kv_heads, group, width, value_width, decay, strength, state=False)
    options = packing(seed, 2, time, packed, masked)
    if state:
        columns = value_width + (flavour == "normalize")
        call["initial_state"] = torch.rand(2, kv_heads, width, columns, dtype=torch.float64).requires_grad_()
    if flavour == "bonus":
        options["bonus"] = torch.randn(kv_heads * group, width, dtype=torch.float64).requires_grad_()
    if flavour == "normalize":
        call["q"] = call["q"].detach().exp().requires_grad_()
        call["k"] = call["k"].detach().exp().requires_grad_()
        options["normalize"] = True
    assert_backends_agree(call, 1e-9, **options)


@pytest.mark.parametrize("width", [24, 60, 64])
@pytest.mark.parametrize("decay", ["constant", "head", "channel"])
def test_chunked_equals_the_loop_in_float32_for_real_head_widths(width, decay):
    call = make(0, 1, 70, 3, 3, width, width, decay, 1.0, dtype=torch.float32)
    assert_backends_agree(call, 1e-4)


@pytest.mark.parametrize("decay", ["constant", "head", "channel"])
def test_strong_decay_neither_overflows_nor_loses_the_current_token(decay):
    call = make(0, 1, 130, 1, 1, 4, 4, decay, 50.0, dtype=torch.float32)
    call["g"] = torch.full_like(call["g"], -50.0).requires_grad_()
    assert_backends_agree(call, 1e-4)
    o, _ = gated_linear_attention(**{name: call[name] for name in "qkvg"}, scale=1.0)
    current = (call["q"] * call["k"]).sum(-1, keepdim=True) * call["v"]
    torch.testing.assert_close(o, current, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", ["none", "constant", "head", "channel"])
def test_gradients_are_those_of_finite_differences(decay):
    call = make(3, 1, 7, 1, 2, 2, 2, decay, 1.0)
    mask = torch.tensor([[True, True, False, True, True, True, True]])
    seq_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    names = list(call)

    def run(*tensors):
        return gated_linear_attention(
            **dict(zip(names, tensors, strict=True)), mask=mask, seq_ids=seq_ids, backend="chunked"
        )

    assert torch.autograd.gradcheck(run, tuple(call.values()))


@repeatable
@given(
    seed=st.integers(0, 1000),
    time=st.sampled_from([2, 17, 66, 100]),
    cut=st.floats(0, 1),
    decay=st.sampled_from(["none", "constant", "head", "channel"]),
    normalize=st.booleans(),
    packed=st.booleans(),
)
def test_whole_equals_two_parts_equals_token_by_token(seed, time, cut, decay, normalize, packed):
    call = make(seed, 2, time, 1, 2, 3, 2, decay, 1.0, state=False)
    if normalize:
        call["q"], call["k"] = call["q"].exp(), call["k"].exp()
    whole, final = gated_linear_attention(**call, normalize=normalize)
    at = min(max(1, round(cut * time)), time - 1)
    for edges in ([0, at, time], list(range(time + 1))):
        state, parts = None, []
        for first, stop in pairwise(edges):
            part = {name: x if x.ndim == 1 else x[:, first:stop] for name, x in call.items()}
            # One document: ids may be anything as long as they are equal, also across the cut.
            options = {"seq_ids": torch.full((2, stop - first), 7)} if packed else {}
            o, state = gated_linear_attention(**part, **options, normalize=normalize, initial_state=state)
            parts.append(o)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state, final, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", ["none", "constant", "head", "channel"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_documents_equal_separate_ones(decay, backend):
    sizes = [5, 1, 70, 30]
    call = make(0, 1, sum(sizes), 1, 2, 3, 2, decay, 1.0, state=False)
    ids = torch.repeat_interleave(torch.tensor([4, 2, 9, 2]), torch.tensor(sizes))[None]
    o, state = gated_linear_attention(**call, seq_ids=ids, backend=backend)
    first = 0
    for size in sizes:
        part = {name: x if x.ndim == 1 else x[:, first : first + size] for name, x in call.items()}
        alone, alone_state = gated_linear_attention(**part, backend=backend)
        torch.testing.assert_close(o[:, first : first + size], alone, rtol=1e-9, atol=1e-9)
        first += size
    torch.testing.assert_close(state, alone_state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("where", ["left", "inside", "right", "everywhere"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_masked_tokens_are_as_if_removed_whatever_they_hold(where, backend):
    time = 80
    call = make(0, 1, time, 1, 2, 3, 2, "channel", 1.0)
    mask = torch.ones(1, time, dtype=torch.bool)
    if where == "everywhere":
        mask[:] = False
    else:
        mask[:, {"left": slice(0, 9), "inside": slice(30, 75), "right": slice(66, None)}[where]] = False
    ids = torch.where(torch.arange(time) < 40, 0, 1)[None]
    call = {
        name: x.detach() if name == "initial_state" else torch.where(mask[..., None, None], x.detach(), torch.nan)
        for name, x in call.items()
    }
    o, state = gated_linear_attention(**call, mask=mask, seq_ids=ids, backend=backend)
    assert (o[~mask] == 0).all()
    if where == "everywhere":
        torch.testing.assert_close(state, call["initial_state"])
        return
    kept = {name: x if name == "initial_state" else x[mask][None] for name, x in call.items()}
    expected, expected_state = gated_linear_attention(**kept, seq_ids=ids[mask][None], backend=backend)
    torch.testing.assert_close(o[mask][None], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, expected_state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_query_groups_read_their_own_head(backend):
    call = make(0, 1, 10, 3, 3, 4, 2, "head", 1.0)
    o, _ = gated_linear_attention(**call, backend=backend)
    for head in range(9):
        own = slice(head // 3, head // 3 + 1)
        alone = {name: call[name][:, :, own] for name in "kvg"}
        expected, _ = gated_linear_attention(
            call["q"][:, :, head : head + 1], **alone, initial_state=call["initial_state"][:, own], backend=backend
        )
        torch.testing.assert_close(o[:, :, head : head + 1], expected)


def test_normalized_output_is_zero_where_nothing_was_seen():
    zero = torch.zeros(1, 3, 1, 2, requires_grad=True)
    v = torch.ones(1, 3, 1, 2, requires_grad=True)
    for backend in ("reference", "chunked"):
        o, _ = gated_linear_attention(zero, zero, v, normalize=True, backend=backend)
        grad = torch.autograd.grad(o.sum(), [zero, v])
        assert (o == 0).all() and all(torch.isfinite(g).all() for g in grad)


@pytest.mark.parametrize("decay", ["none", "constant", "head", "channel"])
def test_bfloat16_is_close_and_keeps_a_float32_state(decay):
    call = make(0, 2, 90, 1, 2, 16, 16, decay, 1.0)
    exact, exact_state = gated_linear_attention(**call)
    low = {
        name: x.detach().to(torch.float32 if name == "initial_state" else torch.bfloat16) for name, x in call.items()
    }
    o, state = gated_linear_attention(**low)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (o - exact).norm() / exact.norm() < 0.02
    assert (state - exact_state).norm() / exact_state.norm() < 0.02


def test_autocast_does_not_touch_the_state():
    call = make(0, 1, 70, 1, 2, 8, 8, "head", 1.0, dtype=torch.float32)
    o, state = gated_linear_attention(**call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_o, low_state = gated_linear_attention(**call)
    assert torch.equal(state, low_state) and torch.equal(o, low_o)


def test_time_and_memory_are_linear_in_length():
    """The largest tensor that the backward keeps grows no faster than the sequence."""

    def largest(time):
        sizes = []
        call = make(0, 1, time, 1, 1, 4, 4, "head", 1.0, state=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            gated_linear_attention(**call)
        return max(sizes)

    assert largest(2048) <= 4.1 * largest(512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 6)}, r"q has shape \(2, 5, 6\); expected \(batch, time, heads, width\)"),
        ({"q": torch.zeros(2, 0, 4, 3)}, "at least one time step"),
        ({"k": torch.zeros(2, 4, 2, 3)}, r"k has shape \(2, 4, 2, 3\); expected \(2, 5, 2, 3\)"),
        ({"q": torch.zeros(2, 5, 3, 3)}, "3 heads and v has 2"),
        ({"g": torch.zeros(2, 5, 2, 2)}, r"g has shape .* expected \(2, 5, 2, 3\) or \(2, 5, 2, 1\) or \(2,\)"),
        ({"bonus": torch.zeros(2, 3)}, r"bonus has shape \(2, 3\); expected \(4, 3\)"),
        ({"initial_state": torch.zeros(2, 2, 3, 5)}, r"initial_state has shape .* expected \(2, 2, 3, 4\)"),
        ({"seq_ids": torch.zeros(2, 5)}, "seq_ids has dtype torch.float32; expected integers"),
        ({"seq_ids": torch.zeros(5, dtype=torch.long)}, "seq_ids has shape"),
        ({"mask": torch.ones(2, 5, dtype=torch.long)}, "mask has dtype torch.int64; expected torch.bool"),
    ],
)
def test_wrong_shapes_name_the_argument_and_what_was_expected(change, message):
    call = {"q": torch.zeros(2, 5, 4, 3), "k": torch.zeros(2, 5, 2, 3), "v": torch.zeros(2, 5, 2, 4)}
    with pytest.raises(ShapeError, match=message):
        gated_linear_attention(**{**call, **change})


def test_bonus_and_normalizer_exclude_each_other():
    x = torch.zeros(1, 2, 1, 3)
    with pytest.raises(RnnzooError, match="bonus cannot be combined"):
        gated_linear_attention(x, x, x, bonus=torch.zeros(1, 3), normalize=True)


FUSED = ["cpu", "triton"]


def skip_if_unavailable(backend):
    reason = {status.backend: status.reason for status in backends("gated_linear_attention")}[backend]
    if reason:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("backend", FUSED)
def test_sudden_forgetting_costs_no_accuracy_before_or_after_it(backend, decay, bonus):
    skip_if_unavailable(backend)
    call = make(0, 1, 50, 2, 1, 20, 24, decay, 0.05, dtype=torch.float32)
    torch.manual_seed(1)
    strong = torch.rand(call["g"].shape)
    for share, log in ((0.1, -20.0), (0.06, -1e4), (0.03, -torch.inf)):
        call["g"] = torch.where(strong < share, log, call["g"].detach())
    exact = {name: x.detach().double().requires_grad_() for name, x in call.items()}
    call = {name: x.detach().requires_grad_() for name, x in call.items()}
    options = {"bonus": torch.randn(2, 20)} if bonus else {}
    found = gated_linear_attention(**call, **options, backend=backend)
    expected = gated_linear_attention(**exact, **options, backend="reference")
    pairs = [*zip(found, expected, strict=True)]
    pairs += zip(gradients(found, list(call.values())), gradients(expected, list(exact.values())), strict=True)
    for a, b in pairs:
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("backend", FUSED)
def test_gradients_reach_bfloat16_queries_beside_float32_decays(backend):
    skip_if_unavailable(backend)
    call = make(0, 1, 40, 1, 2, 16, 16, "channel", 1.0, dtype=torch.float32)
    call = {
        name: x.detach().to(torch.bfloat16 if name in "qkv" else torch.float32).requires_grad_()
        for name, x in call.items()
    }
    exact = {name: x.detach().double().requires_grad_() for name, x in call.items()}
    found = gated_linear_attention(**call, backend=backend)
    expected = gated_linear_attention(**exact, backend="reference")
    assert found[0].dtype == torch.bfloat16
    for (name, x), a, b in zip(
        call.items(),
        gradients(found, list(call.values())),
        gradients(expected, list(exact.values())),
        strict=True,
    ):
        assert a.dtype == x.dtype
        assert (a - b).norm() <= 2e-2 * b.norm(), name


@repeatable
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 9]),
    group=st.integers(1, 3),
    widths=st.sampled_from([(1, 1), (5, 3), (24, 60), (64, 64), (60, 130)]),
    decay=st.sampled_from(["none", "constant", "head", "channel"]),
    flavour=st.sampled_from(["plain", "bonus", "normalize"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_steps_in_place_are_the_recurrence(backend, seed, batch, kv_heads, group, widths, decay, flavour, dtype):
    skip_if_unavailable(backend)
    width, value_width = widths
    call = make(seed, batch, 3, kv_heads, group, width, value_width, decay, 2.0, dtype=torch.float32, state=False)
    call = {name: x.detach() for name, x in call.items()}
    state = torch.rand(batch, kv_heads, width, value_width + (flavour == "normalize"))
    options = {"normalize": True} if flavour == "normalize" else {}
    if flavour == "normalize":
        call["q"], call["k"] = call["q"].exp(), call["k"].exp()
    call = {name: x.to(dtype) for name, x in call.items()}
    if flavour == "bonus":
        options["bonus"] = torch.randn(kv_heads * group, width, dtype=dtype)
    exact = {name: x.double() for name, x in {**call, "initial_state": state}.items()}
    expected, last = gated_linear_attention(**exact, **options, backend="reference")
    g = call.get("g")
    for t in range(3):
        step = (call[name][:, t] for name in "qkv")
        decay_now = g if g is None or g.ndim == 1 else g[:, t]
        o = gated_linear_attention_step(*step, decay_now, state, **options, backend=backend)
        assert o.dtype == dtype and o.shape == expected[:, t].shape
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (o - expected[:, t]).norm() <= tolerance * max(1, expected[:, t].norm())
    assert (state - last).norm() <= 1e-5 * last.norm()


def test_a_step_that_does_not_fit_names_the_shapes():
    q, v, state = torch.zeros(1, 2, 4), torch.zeros(1, 2, 3), torch.zeros(1, 2, 4, 3)
    gated_linear_attention_step(q, q, v, None, state)
    for bad in ((q, q[:, :1], v, None, state), (q, q, v, torch.zeros(1, 2, 2), state), (q, q, q, None, state)):
        with pytest.raises(ShapeError, match=r"q \(1, 2, 4\).* do not fit the state \(1, 2, 4, 3\)"):
            gated_linear_attention_step(*bad)
    with pytest.raises(ShapeError, match="do not fit"):
        gated_linear_attention_step(q, q, v, None, state, normalize=True)


def test_fused_backends_leave_windows_and_empty_widths_to_chunked():
    q, v = torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2, 5)
    names = ("g", "bonus", "initial_state", "seq_ids", "mask")
    call = {**dict.fromkeys(names), "scale": 1.0, "normalize": False, "k": q, "v": v}
    window = Window(q, q, (2, 2))
    empty = {**call, "q": q[..., :0], "k": q[..., :0], "window": None}
    for backend in FUSED:
        skip_if_unavailable(backend)
        assert explain("gated_linear_attention", {**call, "q": q, "window": window})[backend] == "a window"
        assert explain("gated_linear_attention", empty)[backend] == "an empty width"
