"""The losses a few tokens at a time: logits of one block, their loss and gradient, the gradient's products, next block.

For a scalar loss the gradients are formed in the forward pass and multiplied by the incoming gradient in the backward.
For reduction "none" each token has its own incoming gradient, so the backward forms the logits a second time.

The products are torch's on every backend; the backends differ in the passes over a block of logits between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..operators import needs_gradient

# Losses (n,) of a block of tokens, and the gradient (n, V) of the sum of the losses times the tokens' factors.
BlockLoss = tuple[Tensor, Tensor | None]
# The same from the logits (n, V), which it may overwrite, the block's place among the tokens, and its factors (n,);
# without factors there is no gradient.
TokenLoss = Callable[[Tensor, slice, Tensor | None], BlockLoss]


@dataclass(frozen=True)
class Passes:
    """A backend's work on a block of logits (n, V), which it may overwrite.

    Args:
        cross_entropy: (logits, labels (n,), factors, z_loss) -> its BlockLoss.
        kl: (student's logits, teacher's, factors, temperature, reverse) -> its BlockLoss, with the student's gradient.
        add: (total, part) adds a part of the weight's gradient, in the hidden states' dtype, to the total in float32.
    """

    cross_entropy: Callable[[Tensor, Tensor, Tensor | None, float], BlockLoss]
    kl: Callable[[Tensor, Tensor, Tensor | None, float, bool], BlockLoss]
    add: Callable[[Tensor, Tensor], object]


def over_the_logits(cross_entropy_rows: Any, kl_rows: Any, add: Callable[[Tensor, Tensor], object]) -> Passes:
    """The passes of a backend whose operators write the gradient over the logits and return the losses (n,) alone."""
    cross_entropy_rows.register_fake(empty_losses)
    kl_rows.register_fake(empty_losses)

    def cross_entropy(logits: Tensor, labels: Tensor, factors: Tensor | None, z_loss: float) -> BlockLoss:
        losses = cross_entropy_rows(logits, labels, factors, z_loss)
        return losses, None if factors is None else logits

    def kl(student: Tensor, teacher: Tensor, factors: Tensor | None, temperature: float, reverse: bool) -> BlockLoss:
        losses = kl_rows(student, teacher, factors, temperature, reverse)
        return losses, None if factors is None else student

    return Passes(cross_entropy, kl, add)


def empty_losses(logits: Tensor, *others: Any) -> Tensor:
    """What such an operator returns, as memory to fill."""
    return logits.new_empty(len(logits), dtype=torch.float32)


def linear_cross_entropy(
    passes: Passes,
    *,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    z_loss: float,
    chunk_size: int,
    reduction: str,
) -> Tensor:
    """See `kernels.losses.linear_cross_entropy`."""
    counted = labels != ignore_index
    kept = _kept(counted)
    if kept is not None:
        hidden, labels = hidden.index_select(0, kept), labels.index_select(0, kept)

    def token_loss(logits: Tensor, place: slice, factors: Tensor | None) -> BlockLoss:
        return passes.cross_entropy(logits, labels[place], factors, z_loss)

    total = None if reduction != "mean" else counted.sum()
    head = Head(token_loss, passes.add, chunk_size, reduction != "none")
    return _reduce(head, hidden, weight, bias, None, total, kept, len(counted))


def linear_kl(
    passes: Passes,
    *,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    reverse: bool,
    chunk_size: int,
    reduction: str,
) -> Tensor:
    """See `kernels.losses.linear_kl`."""
    tokens = len(student_hidden)
    teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach().to(teacher_hidden.dtype)
    teacher_bias = None if teacher_bias is None else teacher_bias.detach().to(teacher_hidden.dtype)
    kept = coefficients = None
    if weights is not None:
        coefficients = weights.detach().to(softmax_dtype(student_hidden))
        kept = _kept(coefficients > 0)
        if kept is not None:
            student_hidden, teacher_hidden, coefficients = (
                x.index_select(0, kept) for x in (student_hidden, teacher_hidden, coefficients)
            )
    room = _Room(teacher_hidden, teacher_weight, chunk_size)

    def token_loss(logits: Tensor, place: slice, factors: Tensor | None) -> BlockLoss:
        teacher = room.logits(teacher_hidden[place], teacher_weight, teacher_bias)
        return passes.kl(logits, teacher, factors, temperature, reverse)

    if reduction != "mean":
        total = None
    elif coefficients is None:
        total = torch.tensor(float(tokens), device=student_hidden.device)
    else:
        total = coefficients.sum()
        total = torch.where(total == 0, 1.0, total)
    head = Head(token_loss, passes.add, chunk_size, reduction != "none")
    return _reduce(head, student_hidden, student_weight, student_bias, coefficients, total, kept, tokens)


def linear_top_kl(
    top_kl: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], BlockLoss],
    add: Callable[[Tensor, Tensor], object],
    *,
    student_hidden: Tensor,
    student_weight: Tensor,
    indices: Tensor,
    log_probabilities: Tensor,
    log_rest: Tensor,
    student_bias: Tensor | None,
    reverse: bool,
    chunk_size: int,
    reduction: str,
) -> Tensor:
    """See `kernels.losses.linear_top_kl`.

    Args:
        top_kl: (student's logits, indices (n, K), the teacher's log-probabilities (n, K + 1), factors, reverse) -> its
            BlockLoss. add: as in `Passes`.
    """
    teacher = torch.cat([log_probabilities, log_rest[:, None]], 1).detach().to(softmax_dtype(student_hidden))

    def token_loss(logits: Tensor, place: slice, factors: Tensor | None) -> BlockLoss:
        return top_kl(logits, indices[place], teacher[place], factors, reverse)

    tokens = len(student_hidden)
    total = torch.tensor(float(max(1, tokens)), device=student_hidden.device) if reduction == "mean" else None
    head = Head(token_loss, add, chunk_size, reduction != "none")
    return _reduce(head, student_hidden, student_weight, student_bias, None, total, None, tokens)


def softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kept(counted: Tensor) -> Tensor | None:
    """Indices of the tokens that count; None where all do. The others cost nothing and may hold anything."""
    return None if bool(counted.all()) else counted.nonzero().squeeze(1)


class _Room:
    """Memory for the logits of one block, used again for each: fresh pages would cost as much as a pass over them."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk_size: int):
        self.block = hidden.new_empty(min(chunk_size, len(hidden)), len(weight))

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = self.block[: len(hidden)]
        if bias is None:
            return torch.mm(hidden, weight.t(), out=out)
        return torch.addmm(bias, hidden, weight.t(), out=out)


@dataclass
class Head:
    """What one call computes: `scalar`: the sum over tokens; `wants_gradient`: a backward may follow."""

    token_loss: TokenLoss
    add: Callable[[Tensor, Tensor], object]
    chunk_size: int
    scalar: bool
    wants_gradient: bool = False


def _reduce(
    head: Head,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor | None,
    total: Tensor | None,
    kept: Tensor | None,
    tokens: int,
) -> Tensor:
    """The loss of the `kept` tokens, each times its coefficient, reduced over all `tokens`; `total` divides a mean."""
    if coefficients is None:
        coefficients = torch.ones(len(hidden), dtype=softmax_dtype(hidden), device=hidden.device)
    if total is not None:
        coefficients = coefficients / total
    head.wants_gradient = needs_gradient(hidden, weight, bias)
    loss = ChunkedLoss.apply(hidden, weight, bias, coefficients, head)
    if total is not None and len(hidden) == 0:
        loss = loss + torch.where(total == 0, torch.nan, 0.0)  # a mean over no tokens is nan, as torch has it
    if not head.scalar and kept is not None:
        loss = loss.new_zeros(tokens).index_copy(0, kept, loss)
    return loss


class ChunkedLoss(torch.autograd.Function):
    """sum_n coefficients_n * token_loss(hidden_n W^T + bias), or the vector of its terms."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, coefficients, head):
        ctx.head = head
        eager = head.scalar and head.wants_gradient
        needs = ctx.needs_input_grad[:3] if eager else (False, False, False)
        losses, gradients = _chunks(hidden, weight, bias, coefficients if eager else None, head, needs)
        if eager:
            ctx.save_for_backward(*gradients)
        elif head.wants_gradient:
            ctx.save_for_backward(hidden, weight, bias, coefficients)
        weighted = losses * coefficients
        return weighted.sum() if head.scalar else weighted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.head.scalar:
            gradients = [None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors]
        else:
            hidden, weight, bias, coefficients = ctx.saved_tensors
            _, gradients = _chunks(hidden, weight, bias, coefficients * grad, ctx.head, ctx.needs_input_grad[:3])
        return *gradients, None, None


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor | None,
    head: Head,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Each token's loss (N,) and, with coefficients (N,), the gradients of their product's sum."""
    dtype = softmax_dtype(hidden)
    matrix, shift = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=dtype)
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
    grad_bias = torch.zeros_like(bias, dtype=dtype) if needs[2] and bias is not None else None
    room = _Room(hidden, matrix, head.chunk_size)
    for start in range(0, len(hidden), head.chunk_size):
        place = slice(start, min(start + head.chunk_size, len(hidden)))
        logits = room.logits(hidden[place], matrix, shift)
        losses[place], gradient = head.token_loss(logits, place, None if coefficients is None else coefficients[place])
        if gradient is None:
            continue
        if grad_bias is not None:
            grad_bias += gradient.sum(dim=0, dtype=dtype)
        gradient = gradient.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[place] = gradient @ matrix
        if grad_weight is not None and grad_weight.dtype == hidden.dtype:
            grad_weight.addmm_(gradient.t(), hidden[place])
        elif grad_weight is not None:
            head.add(grad_weight, gradient.t() @ hidden[place])
    gradients = [
        None if x is None or like is None else x.to(like.dtype)
        for x, like in ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
    ]
    return losses, gradients
