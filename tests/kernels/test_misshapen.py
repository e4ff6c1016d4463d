"""Calls with nothing in them, and calls whose tensors do not fit each other: an empty result, or one clear sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from rnnzoo.kernels.block_scan import block_scan_step
from rnnzoo.kernels.delta_rule import delta_rule_step
from rnnzoo.kernels.dispatch import use_backend
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.kernels.gated_linear_attention import (
    Window,
    WindowState,
    gated_linear_attention,
    gated_linear_attention_step,
)
from rnnzoo.kernels.linear_scan import linear_scan_step
from rnnzoo.kernels.long_conv import long_conv_step
from rnnzoo.kernels.losses import linear_cross_entropy, linear_kl, linear_top_kl
from rnnzoo.kernels.selective_scan import selective_scan_step
from rnnzoo.kernels.short_conv import short_conv_step
from rnnzoo.kernels.softmax_scan import SoftmaxState, softmax_scan_step
from rnnzoo.kernels.window_step import leaving_keys, window_step

from .recurrences import Shape, cast, inputs_of, recurrences, run

# Of every call below; no two are alike, so that a size tells which it is.
SIZES = {"batch": 2, "heads": 4, "kv_heads": 1, "keys": 3, "values": 5, "states": 7, "tokens": 6, "words": 11}
LENGTHS, SINKS = (4,), 2


def calls(batch, heads, kv_heads, keys, values, states, tokens, words) -> dict[str, tuple[Callable, dict[str, Any]]]:
    """Every operation on one token, and every loss, with arguments of these sizes."""

    def x(*sizes: int) -> torch.Tensor:
        return torch.rand(*sizes)

    def labels(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=torch.int64)

    q, kv, value = x(batch, heads, keys), (batch, kv_heads, keys), x(batch, kv_heads, values)
    made: Any = WindowState  # a State for the type checker, too
    state = vars(made.zeros(batch, LENGTHS * kv_heads, SINKS, keys, states, values, torch.float32))
    scores = (batch, heads, values)
    system = {"a": x(keys, states), "b": x(keys, states), "c": x(keys, states), "d": x(keys)}
    students = {"student_hidden": x(tokens, keys), "student_weight": x(words, keys), "student_bias": x(words)}
    window = {"q": x(batch, heads, states), "near": q, "far": x(batch, heads, keys), "k": x(*kv), "v": value}
    window |= {"leaving": x(batch, kv_heads, states), "g": -x(kv_heads), "factor": x(heads)}
    top = {"indices": labels(tokens, 1), "log_probabilities": x(tokens, 1), "log_rest": x(tokens)}
    delta = {"q": q, "k": x(*kv), "v": value, "a": x(*kv), "b": x(*kv), "g": -x(*kv), "state": x(*kv, values)}
    scan = {"x": x(batch, keys), "dt": x(batch, keys), "a": -x(keys, states), "b": x(batch, states)}
    return {
        "block_scan_step": (block_scan_step, {"a": x(*kv, keys), "x": x(*kv), "state": x(*kv)}),
        "delta_rule_step": (delta_rule_step, delta),
        "gated_linear_attention_step": (
            gated_linear_attention_step,
            {name: delta[name] for name in "qkvg"} | {"state": delta["state"], "bonus": x(heads, keys)},
        ),
        "linear_scan_step": (linear_scan_step, {name: x(batch, keys) for name in ("a", "x", "state")}),
        "long_conv_step": (long_conv_step, {"u": x(batch, keys), **system, "state": x(batch, keys, states)}),
        "selective_scan_step": (
            selective_scan_step,
            scan | {"c": x(batch, states), "d": x(keys), "state": x(batch, keys, states)},
        ),
        "short_conv_step": (
            short_conv_step,
            {"x": x(batch, keys), "weight": x(keys, 4), "bias": x(keys), "state": x(batch, keys, 3)},
        ),
        "softmax_scan_step": (
            softmax_scan_step,
            {"k": x(*scores), "v": x(*scores), "state": SoftmaxState(x(*scores), x(*scores), x(*scores))}
            | {"decay": -x(*scores[1:]), "bonus": x(*scores[1:])},
        ),
        "window_step": (
            lambda **call: window_step(
                **{name: call[name] for name in window},
                state=made(**{name: call[name] for name in state}),
                lengths=LENGTHS * kv_heads,
                sinks=SINKS,
            ),
            window | state,
        ),
        "leaving_keys": (lambda **call: leaving_keys(made(**call), lengths=LENGTHS * kv_heads), state),
        "linear_cross_entropy": (
            linear_cross_entropy,
            {"hidden": x(tokens, keys), "weight": x(words, keys), "labels": labels(tokens), "bias": x(words)},
        ),
        "linear_kl": (
            linear_kl,
            students
            | {"teacher_hidden": x(tokens, values), "teacher_weight": x(words, values)}
            | {"teacher_bias": x(words), "weights": x(tokens)},
        ),
        "linear_top_kl": (linear_top_kl, students | top),
    }


STEPS = sorted(calls(**SIZES))


def outcome(function: Callable, arguments: dict[str, Any], backend: str | None) -> Any:
    """Shapes of the results, or the error."""
    with use_backend(backend):
        try:
            result = function(**pytree.tree_map(lambda x: x.clone(), arguments))
        except Exception as error:
            return error
    return [tuple(x.shape) for x in pytree.tree_leaves(result)]


@pytest.mark.parametrize("size", [*SIZES, "batch heads"])
@pytest.mark.parametrize("name", STEPS)
def test_one_token_with_any_size_0_gives_an_empty_result_or_a_sentence(name, size):
    function, arguments = calls(**SIZES | dict.fromkeys(size.split(), 0))[name]
    for backend in (None, "chunked", "reference"):
        result = outcome(function, arguments, backend)
        assert isinstance(result, (list, RnnzooError)), f"{backend}: {result!r}"
    if size == "batch" and not name.startswith("linear_"):
        assert isinstance(result, list) and result[0][0] == 0


def misshapen(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """x with every axis, one at a time, emptied, longer by one, shorter by one or gone; and with an axis more."""
    for axis, size in enumerate(x.shape):
        yield x.narrow(axis, 0, 0)
        yield torch.cat([x, x.narrow(axis, 0, 1)], axis)
        yield x.select(axis, 0)
        if size > 1:
            yield x.narrow(axis, 0, size - 1)
    yield x[None]


def check_every_misfit(function: Callable, arguments: dict[str, Any]) -> None:
    """Whatever is wrong with one tensor, the fastest backend says so; or the loop makes sense of it, too."""
    leaves, spec = pytree.tree_flatten(arguments)
    for number, leaf in enumerate(leaves):
        for wrong in misshapen(leaf):
            call = pytree.tree_unflatten([*leaves[:number], wrong, *leaves[number + 1 :]], spec)
            result = outcome(function, call, None)
            where = f"{pytree.keystr(pytree.tree_flatten_with_path(arguments)[0][number][0])}: {tuple(wrong.shape)}"
            if isinstance(result, Exception):
                assert isinstance(result, RnnzooError), f"{where}: {result!r}"
            else:
                assert outcome(function, call, "reference") == result, where


@pytest.mark.parametrize("name", STEPS)
def test_one_token_with_a_misshapen_tensor_is_refused(name):
    check_every_misfit(*calls(**SIZES)[name])


SCANS = [(recurrence, variant) for recurrence in recurrences() for variant in recurrence.variants]


@pytest.mark.parametrize(("recurrence", "variant"), SCANS, ids=[f"{r.name}-{variant}" for r, variant in SCANS])
def test_a_sequence_with_a_misshapen_tensor_is_refused(recurrence, variant):
    inputs = cast(recurrence, inputs_of(recurrence, Shape(2, 5, 3, 7), variant, 0), torch.float32)
    steps = {"seq_ids": torch.zeros(2, 5, dtype=torch.int64), "mask": torch.ones(2, 5, dtype=torch.bool)}
    check_every_misfit(lambda **call: recurrence.function(**call, **recurrence.options(variant)), inputs | steps)


@pytest.mark.parametrize("size", ["batch", "time", "heads", "kv_heads", "keys", "values", "states"])
def test_a_window_over_any_size_0_gives_an_empty_result_or_a_sentence(size):
    n = SIZES | {"time": 9} | {size: 0}
    step = n["batch"], n["time"]
    arguments = {
        "q": torch.rand(*step, n["heads"], n["states"]),
        "k": torch.rand(*step, n["kv_heads"], n["states"]),
        "v": torch.rand(*step, n["kv_heads"], n["values"]),
        "near": torch.rand(*step, n["heads"], n["keys"]),
        "exact": torch.rand(*step, n["kv_heads"], n["keys"]),
    }

    def call(q, k, v, near, exact):
        return gated_linear_attention(q, k, v, window=Window(near, exact, LENGTHS * n["kv_heads"], SINKS))[0]

    for backend in (None, "chunked", "reference"):
        result = outcome(call, arguments, backend)
        if size in ("batch", "states"):
            assert result == [(*step, n["heads"], n["values"])]
        else:
            assert isinstance(result, RnnzooError), f"{backend}: {result!r}"


SEQUENCES = [(r, variant, size) for r, variant in SCANS for size in ("batch", "time", "heads", "width")]


@pytest.mark.parametrize(
    ("recurrence", "variant", "size"), SEQUENCES, ids=["-".join((r.name, *x)) for r, *x in SEQUENCES]
)
def test_a_sequence_with_any_size_0_gives_an_empty_result_or_a_sentence(recurrence, variant, size):
    if recurrence.name == "block_scan" and size == "width":
        pytest.skip("its case divides by the width")
    shape = Shape(**{"batch": 2, "time": 5, "heads": 3, "width": 7} | {size: 0})
    inputs = cast(recurrence, inputs_of(recurrence, shape, variant, 0), torch.float32)
    ids = torch.zeros(shape.batch, shape.time, dtype=torch.int64)
    for backend in (None, "chunked", "reference"):
        with use_backend(backend):
            try:
                found = run(recurrence, inputs, variant, None, seq_ids=ids, mask=ids == 0)
            except RnnzooError:
                assert size != "batch"
            else:
                assert (found["output"] == 0).all() and all(x.isfinite().all() for x in found.values())
