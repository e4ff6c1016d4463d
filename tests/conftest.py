"""For all tests: without a GPU, Triton kernels run in Triton's interpreter (to be said before Triton is imported);
and a Hub on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from .hub_double import HubDouble, hub_double

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    """An empty Hub with the user alice, whose token hf_alice may write."""
    with hub_double() as double:
        yield double
