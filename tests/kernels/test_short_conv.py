"""Short causal convolution: against torch's conv1d, against the loop, split, packed and masked."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnzoo.kernels import native
from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.kernels.short_conv import short_conv, short_conv_step

from .cases_short_conv import RECURRENCES
from .recurrences import assert_close, cast, random_steps, rounded, run

BACKENDS = ["reference", "chunked"]


def make(seed, batch, time, taps, dtype=torch.float64):
    torch.manual_seed(seed)
    shapes = {"x": (batch, time, 3), "weight": (3, taps), "bias": (3,), "initial_state": (batch, 3, taps - 1)}
    return {name: torch.randn(*shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    time=st.sampled_from([1, 2, 3, 17]),
    taps=st.sampled_from([1, 2, 4]),
    activation=st.sampled_from([None, "silu"]),
    packed=st.sampled_from([0.0, 0.1, 0.6]),
    masked=st.booleans(),
)
def test_chunked_equals_the_loop(seed, time, taps, activation, packed, masked):
    call = make(seed, 2, time, taps)
    options = {"activation": activation}
    if packed:
        options["seq_ids"] = (torch.rand(2, time) < packed).cumsum(1)
    if masked:
        options["mask"] = torch.rand(2, time) < 0.6
    results = []
    for backend in BACKENDS:
        outputs = short_conv(**call, **options, backend=backend)
        torch.manual_seed(1)
        loss = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, list(call.values()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_a_causal_depthwise_convolution(backend):
    call = make(0, 2, 20, 4)
    y, state = short_conv(call["x"], call["weight"], call["bias"], activation="silu", backend=backend)
    padded = F.pad(call["x"].transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, call["weight"][:, None], call["bias"], groups=3)).transpose(1, 2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, call["x"][:, -3:].transpose(1, 2))


@pytest.mark.parametrize("edges", [[0, 1, 20], [0, 7, 9, 20], list(range(21))])
def test_whole_equals_parts(edges):
    call = make(0, 2, 20, 4)
    whole, final = short_conv(**call)
    state, parts = call["initial_state"], []
    for first, stop in pairwise(edges):
        y, state = short_conv(call["x"][:, first:stop], call["weight"], call["bias"], initial_state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate_and_masked_equals_removed(backend):
    call = make(0, 1, 20, 4)
    weights = {"weight": call["weight"], "bias": call["bias"], "backend": backend}
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([2, 11, 7]))[None]
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[:, [0, 4, 5, 6, 19]] = False
    x = torch.where(mask[..., None], call["x"], torch.nan)
    y, state = short_conv(x, **weights, seq_ids=ids, mask=mask)
    assert (y[~mask] == 0).all()
    for document in range(3):
        own = mask & (ids == document)
        expected, expected_state = short_conv(x[own][None], **weights)
        torch.testing.assert_close(y[own][None], expected)
    torch.testing.assert_close(state, expected_state)


def test_gradients_are_those_of_finite_differences():
    call = make(0, 1, 6, 3)
    names = list(call)
    ids, mask = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[True, False, True, True, True, True]])

    def run(*tensors):
        return short_conv(**dict(zip(names, tensors, strict=True)), activation="silu", seq_ids=ids, mask=mask)

    assert torch.autograd.gradcheck(run, tuple(call.values()))


def test_bfloat16_is_close_and_kept():
    call = {name: x.detach() for name, x in make(0, 2, 50, 4).items()}
    exact, _ = short_conv(**call, activation="silu")
    y, state = short_conv(**{name: x.bfloat16() for name, x in call.items()}, activation="silu")
    assert y.dtype == state.dtype == torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.02


def skip_without_compiler():
    reason = native.problem("short_conv")
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "taps"), [(3, 4), (15, 2), (17, 1), (530, 7), (1100, 16)])
@pytest.mark.parametrize("time", [5, 700])
def test_the_c_code_takes_any_number_of_channels_taps_and_steps(dtype, channels, taps, time):
    """Beyond one block of channels, one task's steps and LANES channels; the last row is masked in full."""
    skip_without_compiler()
    torch.manual_seed(0)
    shapes = {"x": (3, time, channels), "weight": (channels, taps), "bias": (channels,)}
    shapes["initial_state"] = (3, channels, taps - 1)
    inputs = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    steps = random_steps(3, time, 0.05, 0.3)
    steps["mask"][2] = False
    recurrence = RECURRENCES[0]
    expected = run(recurrence, rounded(recurrence, inputs, dtype), "silu", "chunked", **steps)
    found = run(recurrence, cast(recurrence, inputs, dtype), "silu", "cpu", **steps)
    assert_close(found, expected, 1e-5 if dtype == torch.float32 else 2e-2)


def test_more_taps_than_the_c_code_takes_run_elsewhere():
    x, weight = torch.randn(1, 30, 16), torch.randn(16, 17)
    with pytest.raises(RnnzooError, match="weight has 17 taps, more than 16"):
        short_conv(x, weight, backend="cpu")
    torch.testing.assert_close(short_conv(x, weight)[0], short_conv(x, weight, backend="chunked")[0])


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "taps"), [(24, 4), (300, 2), (5, 16), (600, 1)])
def test_a_step_is_a_call_with_one_step_and_changes_the_state_in_place(backend, dtype, channels, taps):
    if backend == "cpu":
        skip_without_compiler()
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, channels), torch.randn(channels, taps), torch.randn(channels)
    state = torch.randn(3, channels, taps - 1)
    x, state = x.to(dtype), state.to(dtype)
    for own_bias, activation in ((bias, "silu"), (None, None)):
        call = {"activation": activation, "initial_state": state.double(), "backend": "reference"}
        wide = None if own_bias is None else own_bias.double()
        expected, after = short_conv(x[:, None].double(), weight.double(), wide, **call)
        y = short_conv_step(x, weight, own_bias, state, activation=activation, backend=backend)
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (y.double() - expected[:, 0]).norm() <= tolerance * expected.norm()
        assert torch.equal(state.double(), after)


def test_a_step_takes_a_strided_input_and_says_which_state_it_needs():
    weight, state = torch.randn(24, 4), torch.zeros(2, 24, 3)
    y = short_conv_step(torch.ones(2, 1).expand(2, 24), weight, None, state)
    torch.testing.assert_close(y, weight[:, -1].expand(2, 24))
    with pytest.raises(ShapeError, match=r"x \(2, 24\), weight \(24, 4\) and state \(2, 24, 4\) do not fit"):
        short_conv_step(torch.ones(2, 24), weight, None, torch.zeros(2, 24, 4))
    turned = torch.zeros(2, 3, 24).transpose(1, 2)
    short_conv_step(torch.ones(2, 24), weight, None, turned)
    assert (turned[..., -1] == 1).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ShapeError, r"x has shape \(2, 3\); expected \(batch, time, channels\)"),
        ({"weight": torch.zeros(4, 2)}, ShapeError, r"weight has shape \(4, 2\); expected \(3, taps\)"),
        ({"bias": torch.zeros(4)}, ShapeError, r"bias has shape \(4,\); expected \(3,\)"),
        ({"initial_state": torch.zeros(2, 3, 4)}, ShapeError, r"initial_state has shape .* expected \(2, 3, 3\)"),
        ({"seq_ids": torch.zeros(2, 4)}, ShapeError, r"seq_ids has shape \(2, 4\); expected \(2, 5\)"),
        ({"mask": torch.zeros(2, 5)}, ShapeError, "mask has dtype torch.float32; expected torch.bool"),
        ({"activation": "relu"}, RnnzooError, "activation is 'relu'; expected None or 'silu'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        short_conv(**{"x": torch.zeros(2, 5, 3), "weight": torch.zeros(3, 4), **change})
