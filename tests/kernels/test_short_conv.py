"""Short causal convolution: against torch's conv1d, against the loop, split, packed and masked."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.kernels.short_conv import short_conv

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
