"""Numbers that share a power of two."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnzoo.kernels.block_floating_point import Packed, pack, quantise

widths = st.sampled_from([2, 8, 24, 32, 60, 64, 96])
seeds = st.integers(0, 2**16)
bits = st.sampled_from([4, 8])
dtypes = st.sampled_from([torch.bfloat16, torch.float32, torch.float64])


def vectors(seed: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, width, generator=generator)
    size = torch.randint(-40, 40, (5, 3, 1), generator=generator)
    return torch.ldexp(x, size).to(dtype)


@given(bits, widths, seeds, dtypes)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_number_moves_by_more_than_half_a_step_of_its_block(count, width, seed, dtype):
    x = vectors(seed, width, dtype).double()
    blocks = x.unflatten(-1, (-1, 32 if width % 32 == 0 else width))
    largest = blocks.abs().amax(-1, keepdim=True)
    step = 2 * largest / (2 ** (count - 1) - 1)  # at most: the power of two above largest / top
    error = (quantise(x, count).unflatten(-1, blocks.shape[-2:]) - blocks).abs()
    assert bool((error <= step / 2).all())


@given(bits, widths, seeds, dtypes)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_packing_keeps_quantised_numbers_exactly_and_quantising_twice_changes_nothing(count, width, seed, dtype):
    x = quantise(vectors(seed, width, dtype), count)
    assert x.dtype == dtype
    assert torch.equal(pack(x, count).unpack(dtype), x)
    assert torch.equal(quantise(x, count), x)


@pytest.mark.parametrize("count", [4, 8])
def test_the_largest_number_of_a_block_on_the_grid_is_exact(count):
    top = 2 ** (count - 1) - 1
    x = torch.full((1, 32), 0.5)
    x[0, 0] = -top
    assert torch.equal(quantise(x, count)[0, 0], x[0, 0])
    assert torch.equal(quantise(torch.zeros(2, 8), count), torch.zeros(2, 8))


@pytest.mark.parametrize(("count", "expected"), [(8, 64 + 2), (4, 32 + 2)])
def test_a_vector_takes_the_bytes_that_are_promised_and_zero_bytes_are_zeros(count, expected):
    packed = pack(torch.randn(64), count)
    assert packed.codes.nbytes + packed.exponents.nbytes == expected
    empty = Packed.zeros(64, bits=count)
    assert (empty.codes.shape, empty.codes.dtype) == (packed.codes.shape, packed.codes.dtype)
    assert (empty.exponents.shape, empty.exponents.dtype) == (packed.exponents.shape, packed.exponents.dtype)
    assert torch.equal(empty.unpack(torch.float32), torch.zeros(64))


def test_the_gradient_passes_unchanged():
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 8, dtype=torch.float64)
    (quantise(x, 4) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
