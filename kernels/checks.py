"""What the public functions of the kernels check, in the same words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import ShapeError

__all__ = ["check_steps", "expect", "expect_all", "expect_axes", "expect_ndim"]


def expect(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raises a ShapeError unless `tensor` is one, of one of these shapes."""
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{name} is a {type(tensor).__name__}; expected a tensor of shape {shapes[0]}.")
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}.")


def expect_all(shapes: dict[str, tuple[Any, tuple[int, ...]]]) -> None:
    """Raises a ShapeError unless each tensor, by its name, has its shape; None has any."""
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")


def expect_axes(name: str, tensor: Tensor, ndim: int, axes: str) -> None:
    """Raises a ShapeError unless `tensor` has these axes."""
    if not isinstance(tensor, Tensor) or tensor.ndim != ndim:
        got = f"has shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"is a {type(tensor).__name__}"
        raise ShapeError(f"{name} {got}; expected {axes}.")


def expect_ndim(name: str, tensor: Tensor, ndim: int, axes: str) -> None:
    """Raises a ShapeError unless `tensor` has these axes and at least one step of time (its second axis)."""
    expect_axes(name, tensor, ndim, axes)
    if tensor.shape[1] == 0:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected at least one time step.")


def check_steps(seq_ids: Tensor | None, mask: Tensor | None, batch: int, time: int) -> None:
    """Raises a ShapeError unless seq_ids are integers and mask is boolean, both (batch, time)."""
    if seq_ids is not None:
        expect("seq_ids", seq_ids, (batch, time))
        if seq_ids.is_floating_point() or seq_ids.dtype == torch.bool:
            raise ShapeError(f"seq_ids has dtype {seq_ids.dtype}; expected integers.")
    if mask is not None:
        expect("mask", mask, (batch, time))
        if mask.dtype != torch.bool:
            raise ShapeError(f"mask has dtype {mask.dtype}; expected torch.bool (True: a real token).")
