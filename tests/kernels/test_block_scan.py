"""What is particular to the block scan; what all recurrences share is in test_recurrences.py."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.block_scan import block_scan, block_scan_step
from rnnzoo.kernels.dispatch import backends
from rnnzoo.kernels.errors import ShapeError

BACKENDS = [status.backend for status in backends("block_scan") if status.reason is None]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_scan_and_change_the_state_in_place(dtype, backend):
    torch.manual_seed(0)
    a, x = 0.4 * torch.randn(3, 7, 2, 5, 5, dtype=dtype), torch.randn(3, 7, 2, 5, dtype=dtype)
    state = torch.randn(3, 2, 5)
    expected, last = block_scan(a, x, initial_state=state, backend="reference")
    found = torch.stack([block_scan_step(a[:, t], x[:, t], state, backend=backend) for t in range(7)], dim=1)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permutations_follow_an_automaton_without_error_for_thousands_of_steps(backend):
    torch.manual_seed(0)
    swap, turn = torch.eye(5)[[1, 0, 2, 3, 4]], torch.eye(5)[[1, 2, 3, 4, 0]]
    letters = torch.randint(0, 2, (2, 3000))
    a = torch.stack([swap, turn])[letters][:, :, None]
    start = torch.eye(5)[0].expand(2, 1, 5).contiguous()
    h, _ = block_scan(a, torch.zeros(2, 3000, 1, 5), initial_state=start, backend=backend)
    for row in range(2):
        place = 0
        for t, letter in enumerate(letters[row].tolist()):
            place = int((turn if letter else swap)[:, place].argmax())
            assert h[row, t, 0].argmax() == place
        assert torch.equal(h[row].sum(-1), torch.ones(3000, 1))


def test_wrong_shapes_are_named():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match=r"a has shape \(2, 3, 4, 5, 4\)"):
        block_scan(torch.zeros(2, 3, 4, 5, 4), x)
    with pytest.raises(ShapeError, match="real numbers"):
        block_scan(torch.zeros(2, 3, 4, 5, 5, dtype=torch.complex64), x)
    with pytest.raises(ShapeError, match=r"state \(2, 4\)"):
        block_scan_step(torch.zeros(2, 4, 5, 5), x[:, 0], torch.zeros(2, 4))
