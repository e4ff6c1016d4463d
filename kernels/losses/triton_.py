"""The losses with Triton between torch's matrix products: the gradient is written over the logits.

One program takes one token and goes through its logits BLOCK at a time, twice: first the logarithm of the sum of the
exponentials, with the maximum so far taken out, then the gradient.
"""

# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import NAMESPACE
from . import blocks


@triton.jit
def _log_sum(row, width, factor, BLOCK: tl.constexpr):
    """log(sum(exp(factor * row))), each lane for itself until the end."""
    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = tl.load(row + c, mask=c < width, other=float("-inf")).to(tl.float32) * factor
        higher = tl.maximum(highest, x)
        shift = tl.where(higher > float("-inf"), higher, 0.0)  # never -inf - -inf
        total = total * tl.exp(highest - shift) + tl.exp(x - shift)
        highest = higher
    top = tl.max(highest, axis=0)
    return top + tl.log(tl.sum(total * tl.exp(highest - top), axis=0))


@triton.jit
def _cross_entropy_kernel(logits, labels, factors, losses, width, z_loss, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * width
    label = tl.load(labels + token)
    chosen = tl.load(row + label).to(tl.float32)  # before the sum, at whose end the threads wait for each other
    log_sum = _log_sum(row, width, 1.0, BLOCK)
    tl.store(losses + token, log_sum - chosen + z_loss * log_sum * log_sum)
    if GRADIENT:
        coefficient = tl.load(factors + token).to(tl.float32)
        scale = (1 + 2 * z_loss * log_sum) * coefficient
        for first in range(0, width, BLOCK):
            c = first + tl.arange(0, BLOCK)
            x = tl.load(row + c, mask=c < width, other=float("-inf")).to(tl.float32)
            gradient = scale * tl.exp(x - log_sum) - tl.where(c == label, coefficient, 0.0)
            tl.store(row + c, gradient.to(logits.dtype.element_ty), mask=c < width)


@triton.jit
def _kl_kernel(
    students, teachers, factors, losses, width, factor, temperature,
    REVERSE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    student, teacher = students + token.to(tl.int64) * width, teachers + token.to(tl.int64) * width
    own, other = _log_sum(student, width, factor, BLOCK), _log_sum(teacher, width, factor, BLOCK)
    coefficient = 0.0
    if GRADIENT:
        coefficient = temperature * tl.load(factors + token).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        s = tl.load(student + c, mask=c < width, other=0.0).to(tl.float32) * factor - own
        t = tl.load(teacher + c, mask=c < width, other=0.0).to(tl.float32) * factor - other
        if REVERSE:
            term = tl.exp(s) * (s - t)
        else:
            p = tl.exp(t)
            term = p * (t - s)
            if GRADIENT:
                gradient = coefficient * (tl.exp(s) - p)
                tl.store(student + c, gradient.to(students.dtype.element_ty), mask=c < width)
        total += tl.where(c < width, term, 0.0)
    mean = tl.sum(total, axis=0)
    tl.store(losses + token, mean * temperature * temperature)
    if REVERSE and GRADIENT:
        for first in range(0, width, BLOCK):
            c = first + tl.arange(0, BLOCK)
            s = tl.load(student + c, mask=c < width, other=0.0).to(tl.float32) * factor - own
            t = tl.load(teacher + c, mask=c < width, other=0.0).to(tl.float32) * factor - other
            gradient = coefficient * tl.exp(s) * (s - t - mean)
            tl.store(student + c, gradient.to(students.dtype.element_ty), mask=c < width)


def _sizes(width: int) -> dict[str, int]:
    return {"BLOCK": min(4096, triton.next_power_of_2(width)), "num_warps": 8 if width > 1024 else 4}


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_rows_triton", mutates_args=("logits",))
def cross_entropy_rows(logits: Tensor, labels: Tensor, factors: Tensor | None, z_loss: float) -> Tensor:
    """Losses (n,); `logits` (n, V) become the gradient where there are factors (n,)."""
    losses = blocks.empty_losses(logits)
    rows, width = logits.shape
    if rows:
        used = losses if factors is None else factors.contiguous()
        options = {"GRADIENT": factors is not None, **_sizes(width)}
        _cross_entropy_kernel[(rows,)](logits, labels.contiguous(), used, losses, width, z_loss, **options)
    return losses


@torch.library.custom_op(f"{NAMESPACE}::kl_rows_triton", mutates_args=("student",))
def kl_rows(student: Tensor, teacher: Tensor, factors: Tensor | None, temperature: float, reverse: bool) -> Tensor:
    """Losses (n,); the student's logits (n, V) become its gradient where there are factors (n,)."""
    losses = blocks.empty_losses(student)
    rows, width = student.shape
    if rows:
        used = losses if factors is None else factors.contiguous()
        options = {"REVERSE": reverse, "GRADIENT": factors is not None, **_sizes(width)}
        _kl_kernel[(rows,)](student, teacher, used, losses, width, 1 / temperature, temperature, **options)
    return losses


PASSES = blocks.over_the_logits(cross_entropy_rows, kl_rows, Tensor.add_)
linear_cross_entropy = functools.partial(blocks.linear_cross_entropy, PASSES)
linear_kl = functools.partial(blocks.linear_kl, PASSES)
