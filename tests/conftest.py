"""For all tests: without a GPU, Triton kernels run in Triton's interpreter (to be said before Triton is imported);
a Hub on loopback; and a log that no test changes for the next."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

from .hub_double import HubDouble, hub_double

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def log() -> None:
    """What a command line of an earlier test set of the package's log (quiet, for one) has ended."""
    logger = logging.getLogger("rnnzoo")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    """An empty Hub with the user alice, whose token hf_alice may write."""
    with hub_double() as double:
        yield double
