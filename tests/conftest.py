"""For all tests: without a GPU, Triton kernels run in Triton's interpreter (to be said before Triton is imported);
a Hub on loopback; and a log that no test changes for the next."""

from __future__ import annotations

import dataclasses
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
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of `--limits quick` and `standard` measure the same things on a sixteenth of the tokens."""
    from rnnzoo.conversions.evaluation.limits import LIMITS  # loads transformers, which tests of kernels do without

    for name in ("quick", "standard"):
        sizes = {"perplexity_tokens": 1024, "position_tokens": 1024, "ablation_tokens": 512, "contexts": (64, 512)}
        sizes |= {"recall_contexts": (256,), "distances": (16, 64), "decode_steps": 4, "sample_tokens": 8, "streams": 1}
        monkeypatch.setitem(LIMITS, name, dataclasses.replace(LIMITS[name], **sizes))


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    """An empty Hub with the user alice, whose token hf_alice may write."""
    with hub_double() as double:
        yield double
