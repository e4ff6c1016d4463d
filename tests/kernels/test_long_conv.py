"""What is particular to the long convolution; what all recurrences share is in test_recurrences.py."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.dispatch import use_backend
from rnnzoo.kernels.errors import ShapeError
from rnnzoo.kernels.long_conv import long_conv, long_conv_step
from rnnzoo.kernels.long_conv.chunked import System

from .cases_long_conv import RECURRENCES, VARIANTS
from .recurrences import Shape, cast, inputs_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_steps_equal_the_whole_and_change_the_state_in_place(variant, dtype, backend):
    inputs = cast(RECURRENCES[0], inputs_of(RECURRENCES[0], Shape(3, 7, 1, 9), variant, 0), dtype)
    expected, last = long_conv(**inputs, backend="reference")
    u, state, d = inputs.pop("u"), inputs.pop("initial_state").clone(), inputs.pop("d", None)
    found = torch.stack([long_conv_step(u[:, t], d=d, state=state, backend=backend, **inputs) for t in range(7)], dim=1)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("variant", VARIANTS)
def test_thousands_of_steps_in_float32_equal_the_loop_in_float64(variant):
    inputs = inputs_of(RECURRENCES[0], Shape(1, 3000, 1, 5), variant, 1)
    inputs["a"] = inputs["a"] / (0.99 if variant != "low rank" else 1.0)
    expected, last = long_conv(**inputs, backend="reference")
    for parts in ([3000], [1, 1700, 33, 1266]):
        given, outputs = cast(RECURRENCES[0], inputs, torch.float32), []
        for u in given.pop("u").split(parts, 1):
            y, given["initial_state"] = long_conv(u, **given, backend="chunked")
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1).double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(given["initial_state"].to(last.dtype), last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[1] * 500 + [500], [1000], [300, 300, 400]])
def test_packed_documents_take_room_in_proportion_to_their_tokens(lengths, monkeypatch):
    """One long document does not make rows of its length of all the short ones."""
    convolved, convolve = [], System.convolve
    monkeypatch.setattr(System, "convolve", lambda self, u: convolved.append(u.shape[:2].numel()) or convolve(self, u))
    inputs = inputs_of(RECURRENCES[0], Shape(1, 1000, 1, 3), "diagonal", 0, state=False)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    y, _ = long_conv(**inputs, seq_ids=ids, backend="chunked")
    assert sum(convolved) <= 2000
    torch.testing.assert_close(y, long_conv(**inputs, seq_ids=ids, backend="reference")[0])


def test_a_batch_of_padding_alone_leaves_the_state():
    inputs = inputs_of(RECURRENCES[0], Shape(2, 5, 1, 3), "dense", 0)
    y, last = long_conv(**inputs, mask=torch.zeros(2, 5, dtype=torch.bool), backend="chunked")
    assert not y.any() and torch.equal(last, inputs["initial_state"])


def test_wrong_shapes_are_named():
    u, a = torch.zeros(2, 3, 4), torch.zeros(4, 6)
    with pytest.raises(ShapeError, match=r"a has shape \(4, 5\)"):
        long_conv(u, torch.zeros(4, 5), a, a)
    with pytest.raises(ShapeError, match=r"c has shape \(3, 2, 6\)"):
        long_conv(u, a, a, torch.zeros(3, 2, 6))
    with pytest.raises(ShapeError, match="p and q come together"):
        long_conv(u, a, a, a, p=torch.zeros(4, 6, 1))
    with pytest.raises(ShapeError, match=r"state has shape \(2, 6\)"):
        long_conv_step(u[:, 0], a, a, a, None, torch.zeros(2, 6))
    with use_backend("reference"):
        assert long_conv(u, a, a, a)[0].shape == u.shape
