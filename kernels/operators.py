"""What the custom operators of the fused backends have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "contiguous", "needs_gradient", "unfit"]

NAMESPACE = "rnnzoo"
if __package__ != "rnnzoo.kernels":
    # A published model brings these modules along in a package of its own; torch has one table of operators a process.
    NAMESPACE += "_" + hashlib.sha256(str(__package__).encode()).hexdigest()[:16]


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may come, so that forward must keep what it needs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Each as its rows lie one after the other; None stays."""
    return [None if x is None else x.contiguous() for x in tensors]


def unfit(call: dict[str, Any], on_device: Callable[[Tensor], bool], dtypes: Sequence[torch.dtype]) -> str | None:
    """Which of a call's arguments is not for a fused backend, and why; None where all are.

    Args:
        call: by name, and anything: what is no tensor, or a tuple of them, is passed over.
        on_device: whether the backend's device has this tensor. dtypes: of floating and complex tensors.
    """
    for name, tensor in _tensors(call):
        if not on_device(tensor):
            return f"{name} is on {tensor.device.type}"
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in dtypes:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _tensors(call: dict[str, Any]) -> list[tuple[str, Tensor]]:
    named = []
    for name, value in call.items():
        if isinstance(value, Tensor):
            named.append((name, value))
        elif isinstance(value, tuple):
            named += _tensors({f"{name}[{index}]": part for index, part in enumerate(value)})
    return named
