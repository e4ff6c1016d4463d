"""The losses with C (`cpu.c`) between torch's matrix products: the gradient is written over the logits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..native import function, pointer
from ..operators import NAMESPACE
from . import blocks


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_rows_cpu", mutates_args=("logits",))
def cross_entropy_rows(logits: Tensor, labels: Tensor, factors: Tensor | None, z_loss: float) -> Tensor:
    """Losses (n,); `logits` (n, V) become the gradient where there are factors (n,)."""
    rows, width = logits.shape
    if rows and not 0 <= int(labels.min()) <= int(labels.max()) < width:
        wrong = next(int(label) for label in labels if not 0 <= label < width)
        raise IndexError(f"Target {wrong} is out of bounds: the vocabulary has {width} entries.")
    losses = blocks.empty_losses(logits)
    labels, factors = labels.contiguous(), None if factors is None else factors.contiguous()
    function("losses", "cross_entropy_rows", "ppppiifii")(
        *map(pointer, (logits, labels, factors, losses)),
        *(rows, width, z_loss, torch.get_num_threads(), logits.dtype == torch.bfloat16),
    )
    return losses


@torch.library.custom_op(f"{NAMESPACE}::kl_rows_cpu", mutates_args=("student",))
def kl_rows(student: Tensor, teacher: Tensor, factors: Tensor | None, temperature: float, reverse: bool) -> Tensor:
    """Losses (n,); the student's logits (n, V) become its gradient where there are factors (n,)."""
    losses = blocks.empty_losses(student)
    factors = None if factors is None else factors.contiguous()
    function("losses", "kl_rows", "ppppiifiiii")(
        *map(pointer, (student, teacher, factors, losses)),
        *(*student.shape, temperature, reverse, torch.get_num_threads()),
        *(x.dtype == torch.bfloat16 for x in (student, teacher)),
    )
    return losses


@torch.library.custom_op(f"{NAMESPACE}::add_bf16_cpu", mutates_args=("total",))
def add_bf16(total: Tensor, part: Tensor) -> None:
    """total (float32) += part (bfloat16), without a copy of the part in float32."""
    part = part.contiguous()
    function("losses", "add_bf16", "ppii")(pointer(total), pointer(part), total.numel(), torch.get_num_threads())


@add_bf16.register_fake
def _(total, part):
    pass


PASSES = blocks.over_the_logits(cross_entropy_rows, kl_rows, add_bf16)
linear_cross_entropy = functools.partial(blocks.linear_cross_entropy, PASSES)
linear_kl = functools.partial(blocks.linear_kl, PASSES)
