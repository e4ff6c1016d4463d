"""What the fused steps of decoding promise alike: any size, any number of threads, every output written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from rnnzoo.kernels import native
from rnnzoo.kernels.errors import ShapeError
from rnnzoo.kernels.linear_scan import linear_scan, linear_scan_step
from rnnzoo.kernels.selective_scan import selective_scan, selective_scan_step
from rnnzoo.kernels.short_conv import short_conv, short_conv_step
from rnnzoo.kernels.softmax_scan import SoftmaxState, softmax_scan, softmax_scan_step

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Decoding:
    """A step and the scan that it is one step of.

    Args:
        make: (batch, channels) -> (inputs of one step, state), float64. timed: those with an axis of time in the scan.
        scan: (inputs, state) -> (output, state), by the loop. step: -> output; the state in place, by the C code.
        keeps_state_dtype: the state has the inputs' dtype.
    """

    folder: str
    make: Callable[[int, int], tuple[Inputs, Any]]
    timed: frozenset[str]
    scan: Callable[[Inputs, Any], tuple[Tensor, Any]]
    step: Callable[[Inputs, Any], Tensor]
    keeps_state_dtype: bool = False


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _linear() -> Decoding:
    return Decoding(
        "linear_scan",
        lambda b, n: ({"a": randn(b, n), "x": randn(b, n)}, randn(b, n)),
        frozenset("ax"),
        lambda inputs, state: linear_scan(**inputs, initial_state=state, backend="reference"),
        lambda inputs, state: linear_scan_step(**inputs, state=state, backend="cpu"),
    )


def _selective(states: int) -> Decoding:
    def make(b: int, n: int) -> tuple[Inputs, Any]:
        inputs = {"x": randn(b, n), "dt": randn(b, n).abs(), "a": -randn(n, states).abs(), "b": randn(b, states)}
        return inputs | {"c": randn(b, states), "d": randn(n)}, randn(b, n, states)

    return Decoding(
        "selective_scan",
        make,
        frozenset({"x", "dt", "b", "c"}),
        lambda inputs, state: selective_scan(**inputs, initial_state=state, backend="reference"),
        lambda inputs, state: selective_scan_step(**inputs, state=state, backend="cpu"),
    )


def _conv(taps: int, activation: str | None, bias: bool) -> Decoding:
    def make(b: int, n: int) -> tuple[Inputs, Any]:
        inputs = {"x": randn(b, n), "weight": randn(n, taps), "bias": randn(n) if bias else None}
        return inputs, randn(b, n, taps - 1)

    options = {"activation": activation}
    return Decoding(
        "short_conv",
        make,
        frozenset("x"),
        lambda inputs, state: short_conv(**inputs, **options, initial_state=state, backend="reference"),
        lambda inputs, state: short_conv_step(**inputs, **options, state=state, backend="cpu"),
        keeps_state_dtype=True,
    )


def _softmax(per: int, decay: bool, bonus: bool) -> Decoding:
    """`per` values a score; per = 1 is a score a channel, of one head."""

    def make(b: int, n: int) -> tuple[Inputs, Any]:
        heads, scores, width = (1, n, n) if per == 1 else (-(-n // per), 1, per)
        inputs = {"k": 3 * randn(b, heads, scores), "v": randn(b, heads, width)}
        inputs["decay"] = -randn(heads, scores).exp() if decay else None
        inputs["bonus"] = randn(heads, scores) if bonus else None
        inputs["k"][:, :, ::3] = float("-inf")
        state = SoftmaxState(3 * randn(b, heads, scores), randn(b, heads, width), 1 + randn(b, heads, scores).abs())
        if per == 1:  # every fourth channel has seen nothing, every twelfth sees nothing either
            for x, nothing in zip(state, (float("-inf"), 0.0, 0.0), strict=True):
                x[:, :, ::4] = nothing
        return inputs, state

    return Decoding(
        "softmax_scan",
        make,
        frozenset("kv"),
        lambda inputs, state: softmax_scan(**inputs, initial_state=state, backend="reference"),
        lambda inputs, state: softmax_scan_step(**inputs, state=state, backend="cpu"),
    )


DECODINGS = {
    "linear": _linear(),
    "selective, 16 states": _selective(16),
    "selective, 5 states": _selective(5),
    "conv of 4": _conv(4, None, True),
    "conv of 4, silu, no bias": _conv(4, "silu", False),
    "conv of 3, silu": _conv(3, "silu", True),
    "softmax, channels": _softmax(1, True, True),
    "softmax, channels without a bonus": _softmax(1, True, False),
    "softmax, channels without a decay": _softmax(1, False, True),
    "softmax, heads": _softmax(60, False, False),
    "softmax, heads with decay and bonus": _softmax(64, True, True),
}
every_decoding = pytest.mark.parametrize("name", DECODINGS)


def of(name: str) -> Decoding:
    decoding = DECODINGS[name]
    if reason := native.problem(decoding.folder):
        pytest.skip(reason)
    return decoding


def cast(value: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.to(dtype), value)


def ready(decoding: Decoding, batch: int, channels: int, dtype: torch.dtype, seed: int = 0) -> tuple[Inputs, Any]:
    torch.manual_seed(seed)
    inputs, state = decoding.make(batch, channels)
    return cast(inputs, dtype), cast(state, dtype if decoding.keeps_state_dtype else torch.float32)


@every_decoding
@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    batch=st.sampled_from([1, 3]),
    channels=st.sampled_from([1, 15, 16, 17, 24, 60, 64, 128, 257, 530]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_step_is_one_step_of_the_loop(name, seed, batch, channels, dtype):
    decoding = of(name)
    inputs, state = ready(decoding, batch, channels, dtype, seed)
    exact = cast(inputs, torch.float64)
    exact = {key: x[:, None] if key in decoding.timed else x for key, x in exact.items()}
    expected, after = decoding.scan(exact, cast(state, torch.float64))
    out = decoding.step(inputs, state)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    pairs = [(out, expected[:, 0]), *zip(pytree.tree_leaves(state), pytree.tree_leaves(after), strict=True)]
    for found, right in pairs:
        found = found.double()
        assert torch.equal(found.isfinite(), right.isfinite())
        error, size = ((x[right.isfinite()]).norm() for x in (found - right, right))
        assert error <= tolerance * size + 1e-30


@every_decoding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit_and_every_output_is_written(name, dtype):
    """As wide as it takes for a step to wake other threads, and no multiple of what one of them gets."""
    decoding = of(name)
    results, threads = [], torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # torch fills what it allocates with nan
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            inputs, state = ready(decoding, 3, 9007, dtype)
            results.append([decoding.step(inputs, state), *pytree.tree_leaves(state)])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert not any(x.isnan().any() for x in results[0])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@every_decoding
def test_strided_inputs_are_read_right(name):
    decoding = of(name)
    inputs, state = ready(decoding, 3, 60, torch.float32)
    again = pytree.tree_map_only(Tensor, torch.clone, state)
    strided = pytree.tree_map_only(Tensor, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), inputs)
    assert torch.equal(decoding.step(inputs, state), decoding.step(strided, again))
    for x, y in zip(pytree.tree_leaves(state), pytree.tree_leaves(again), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["decay", "bonus"])
def test_parameters_of_another_size_are_refused(name):
    inputs, state = ready(DECODINGS["softmax, channels"], 1, 24, torch.float32)
    with pytest.raises(ShapeError, match=rf"{name} has shape \(1, 23\); expected \(1, 24\)"):
        softmax_scan_step(**inputs | {name: inputs[name][:, 1:]}, state=state)


def test_scores_that_are_neither_of_heads_nor_of_channels_are_refused():
    k = torch.zeros(1, 2, 4)
    with pytest.raises(ShapeError, match="do not fit"):
        softmax_scan_step(k, torch.zeros(1, 2, 8), SoftmaxState(k, torch.zeros(1, 2, 8), k))


def test_a_bias_of_another_size_is_refused():
    with pytest.raises(ShapeError, match=r"bias has shape \(23,\); expected \(24,\)"):
        short_conv_step(torch.zeros(1, 24), torch.zeros(24, 4), torch.zeros(23), torch.zeros(1, 24, 3))
