"""The losses a few tokens at a time: logits of one chunk, their loss and gradient, the gradient's products, next chunk.

For a scalar loss the gradients are formed in the forward pass and multiplied by the incoming gradient in the backward.
For reduction "none" each token has its own incoming gradient, so the backward forms the logits a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# From the logits of some tokens (n, V) and their place, the loss (n,) and, where asked for, its gradient (n, V).
TokenLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


def linear_cross_entropy(
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

    def token_loss(logits: Tensor, place: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        target = labels[place, None]
        log_probabilities = logits.log_softmax(dim=-1, dtype=_softmax_dtype(logits))
        chosen = log_probabilities.gather(1, target)
        normalizer = logits.gather(1, target).to(chosen.dtype) - chosen
        loss = (z_loss * normalizer.square() - chosen).squeeze(1)
        if not with_gradient:
            return loss, None
        gradient = log_probabilities.exp_()
        if z_loss:
            gradient *= 1 + 2 * z_loss * normalizer
        return loss, gradient.scatter_add_(1, target, torch.full_like(chosen, -1.0))

    total = None if reduction != "mean" else counted.sum()
    return _reduce(hidden, weight, bias, token_loss, None, total, chunk_size, reduction, kept, len(counted))


def linear_kl(
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
        coefficients = weights.detach().to(_softmax_dtype(student_hidden))
        kept = _kept(coefficients > 0)
        if kept is not None:
            student_hidden, teacher_hidden, coefficients = (
                x.index_select(0, kept) for x in (student_hidden, teacher_hidden, coefficients)
            )

    def token_loss(logits: Tensor, place: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        student = _scaled_log_softmax(logits, temperature)
        teacher = _scaled_log_softmax(F.linear(teacher_hidden[place], teacher_weight, teacher_bias), temperature)
        teacher = teacher.to(student.dtype)
        if reverse:
            probabilities = student.exp()
            difference = student.sub_(teacher)
            loss = torch.linalg.vecdot(probabilities, difference)
            gradient = difference.sub_(loss[:, None]).mul_(probabilities) if with_gradient else None
        else:
            probabilities = teacher.exp()
            loss = torch.linalg.vecdot(probabilities, teacher.sub_(student))
            gradient = student.exp_().sub_(probabilities) if with_gradient else None
        return loss * temperature**2, None if gradient is None else gradient.mul_(temperature)

    if reduction != "mean":
        total = None
    elif coefficients is None:
        total = torch.tensor(float(tokens), device=student_hidden.device)
    else:
        total = coefficients.sum()
        total = torch.where(total == 0, 1.0, total)
    return _reduce(
        student_hidden,
        student_weight,
        student_bias,
        token_loss,
        coefficients,
        total,
        chunk_size,
        reduction,
        kept,
        tokens,
    )


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scaled_log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature != 1.0:
        logits = logits.to(_softmax_dtype(logits)) / temperature
    return logits.log_softmax(dim=-1, dtype=_softmax_dtype(logits))


def _kept(counted: Tensor) -> Tensor | None:
    """Indices of the tokens that count; None where all do. The others cost nothing and may hold anything."""
    return None if bool(counted.all()) else counted.nonzero().squeeze(1)


def _reduce(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_loss: TokenLoss,
    coefficients: Tensor | None,
    total: Tensor | None,
    chunk_size: int,
    reduction: str,
    kept: Tensor | None,
    tokens: int,
) -> Tensor:
    """The loss of the `kept` tokens, each times its coefficient, reduced over all `tokens`; `total` divides a mean."""
    if coefficients is None:
        coefficients = torch.ones(len(hidden), dtype=_softmax_dtype(hidden), device=hidden.device)
    if total is not None:
        coefficients = coefficients / total
    wants = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    head = Head(token_loss, chunk_size, reduction != "none", wants)
    loss = ChunkedLoss.apply(hidden, weight, bias, coefficients, head)
    if total is not None and len(hidden) == 0:
        loss = loss + torch.where(total == 0, torch.nan, 0.0)  # a mean over no tokens is nan, as torch has it
    if reduction == "none" and kept is not None:
        loss = loss.new_zeros(tokens).index_copy(0, kept, loss)
    return loss


@dataclass
class Head:
    """What one call computes: `scalar`: the sum over tokens; `wants_gradient`: a backward may follow."""

    token_loss: TokenLoss
    chunk_size: int
    scalar: bool
    wants_gradient: bool


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
    dtype = _softmax_dtype(hidden)
    matrix, shift = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=dtype)
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
    grad_bias = torch.zeros_like(bias, dtype=dtype) if needs[2] and bias is not None else None
    for start in range(0, len(hidden), head.chunk_size):
        place = slice(start, min(start + head.chunk_size, len(hidden)))
        logits = F.linear(hidden[place], matrix, shift)
        losses[place], gradient = head.token_loss(logits, place, coefficients is not None)
        if coefficients is None or gradient is None:
            continue
        gradient *= coefficients[place, None]
        if grad_bias is not None:
            grad_bias += gradient.sum(dim=0)
        gradient = gradient.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[place] = gradient @ matrix
        if grad_weight is not None:
            grad_weight += gradient.t() @ hidden[place]
    gradients = [
        None if x is None or like is None else x.to(like.dtype)
        for x, like in ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
    ]
    return losses, gradients
