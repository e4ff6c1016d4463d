"""What is particular to the linear scan; what all recurrences share is in test_recurrences.py."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.dispatch import backends
from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.kernels.linear_scan import linear_scan, linear_scan_step

STEP_BACKENDS = [status.backend for status in backends("linear_scan_step")]


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("channels", [1, 60, 144])
def test_steps_equal_the_scan_and_change_the_state_in_place(backend, dtype, channels):
    torch.manual_seed(0)
    a, x = (torch.randn(3, 7, channels, dtype=dtype) for _ in range(2))
    state = torch.randn(3, channels, dtype=torch.complex64 if dtype.is_complex else torch.float32)
    expected, last = linear_scan(0.5 * a, x, initial_state=state, backend="reference")
    own = state.clone()
    try:
        found = torch.stack([linear_scan_step(0.5 * a[:, t], x[:, t], own, backend=backend) for t in range(7)], dim=1)
    except RnnzooError as error:
        pytest.skip(str(error))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own, last)


def test_a_step_without_a_backend_named_takes_any_state():
    a, x, state = torch.rand(2, 6).t(), torch.rand(6, 2).bfloat16(), torch.zeros(2, 6).t()
    h = linear_scan_step(a, x, state)
    assert h.dtype == torch.bfloat16 and torch.equal(h, x) and torch.equal(state, x.float())


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_outputs_larger_than_the_caches_are_written_past_them_alike(backend):
    torch.manual_seed(0)
    a, x = torch.rand(1, 4100, 1040, requires_grad=True), torch.randn(1, 4100, 1040, requires_grad=True)
    h, last = linear_scan(a, x, backend=backend)
    parts, state = [], None
    for first, stop in ((0, 2000), (2000, 4100)):
        part, state = linear_scan(a[:, first:stop], x[:, first:stop], initial_state=state, backend=backend)
        parts.append(part)
    whole = torch.autograd.grad(h.cos().sum() + last.sum(), (a, x))
    split = torch.autograd.grad(torch.cat(parts, dim=1).cos().sum() + state.sum(), (a, x))
    torch.testing.assert_close(torch.cat(parts, dim=1), h)
    for found, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_wrong_shapes_are_named():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ShapeError, match=r"a has shape \(2, 3, 5\)"):
        linear_scan(torch.zeros(2, 3, 5), x)
    with pytest.raises(ShapeError, match="both real or both complex"):
        linear_scan(x.to(torch.complex64), x)
    with pytest.raises(ShapeError, match=r"state \(3, 4\)"):
        linear_scan_step(x[:, 0], x[:, 0], torch.zeros(3, 4))
