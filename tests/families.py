"""Architectures that stand for their families where a test of every one would take minutes."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

OFTEN = {"transformer", "gla", "mamba2", "gated_delta_net", "rwkv7", "hedgehog", "salient", "xlstm", "hawk", "s4"}


def often(architectures: Iterable[str]) -> list:
    """As parameters of a test: OFTEN in the default suite, the others with the slow tests."""
    return [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in architectures]
