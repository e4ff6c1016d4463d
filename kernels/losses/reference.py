"""The losses as their equations say, with all logits in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """See `kernels.losses.linear_cross_entropy`; `chunk_size` does not apply."""
    logits = _logits(hidden, weight, bias)
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    counted = labels != ignore_index
    loss = loss + torch.where(counted, z_loss * logits.logsumexp(dim=-1).square(), 0.0)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


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
    """See `kernels.losses.linear_kl`; `chunk_size` does not apply."""
    student = (_logits(student_hidden, student_weight, student_bias) / temperature).log_softmax(dim=-1)
    with torch.no_grad():
        teacher = (_logits(teacher_hidden, teacher_weight, teacher_bias) / temperature).log_softmax(dim=-1)
    first, second = (student, teacher) if reverse else (teacher, student)
    loss = (first.exp() * (first - second)).sum(dim=-1) * temperature**2
    counted = torch.ones_like(loss) if weights is None else weights.to(loss.dtype)
    loss = torch.where(counted > 0, loss, 0.0) * counted
    return (
        loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / _at_least_one(counted.sum())
    )


def linear_top_kl(
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
    """See `kernels.losses.linear_top_kl`; `chunk_size` does not apply."""
    student = _logits(student_hidden, student_weight, student_bias).log_softmax(dim=-1)
    others = student.scatter(1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    student = torch.cat([student.gather(1, indices), others], 1)
    teacher = torch.cat([log_probabilities, log_rest[:, None]], 1).detach().to(student.dtype)
    first, second = (student, teacher) if reverse else (teacher, student)
    loss = (first.exp() * (first - second)).sum(dim=-1)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / max(1, len(loss))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return logits if logits.dtype == torch.float64 else logits.float()


def _at_least_one(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1.0, total)
