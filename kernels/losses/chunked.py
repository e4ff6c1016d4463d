"""The losses a few tokens at a time (`blocks.py`) with plain torch between the products, on any device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import blocks
from .blocks import BlockLoss, Passes, softmax_dtype


def _cross_entropy(logits: Tensor, labels: Tensor, factors: Tensor | None, z_loss: float) -> BlockLoss:
    target = labels[:, None]
    log_probabilities = logits.log_softmax(dim=-1, dtype=softmax_dtype(logits))
    chosen = log_probabilities.gather(1, target)
    normalizer = logits.gather(1, target).to(chosen.dtype) - chosen
    loss = (z_loss * normalizer.square() - chosen).squeeze(1)
    if factors is None:
        return loss, None
    gradient = log_probabilities.exp_()
    if z_loss:
        gradient *= 1 + 2 * z_loss * normalizer
    gradient.scatter_add_(1, target, torch.full_like(chosen, -1.0))
    return loss, gradient.mul_(factors[:, None])


def _kl(student: Tensor, teacher: Tensor, factors: Tensor | None, temperature: float, reverse: bool) -> BlockLoss:
    student = _scaled_log_softmax(student, temperature)
    teacher = _scaled_log_softmax(teacher, temperature).to(student.dtype)
    if reverse:
        probabilities = student.exp()
        difference = student.sub_(teacher)
        loss = torch.linalg.vecdot(probabilities, difference)
        gradient = None if factors is None else difference.sub_(loss[:, None]).mul_(probabilities)
    else:
        probabilities = teacher.exp()
        loss = torch.linalg.vecdot(probabilities, teacher.sub_(student))
        gradient = None if factors is None else student.exp_().sub_(probabilities)
    if gradient is not None and factors is not None:
        gradient *= temperature * factors[:, None]
    return loss * temperature**2, gradient


def _top_kl(logits: Tensor, indices: Tensor, teacher: Tensor, factors: Tensor | None, reverse: bool) -> BlockLoss:
    student = logits.log_softmax(dim=-1, dtype=softmax_dtype(logits))
    kept = student.gather(1, indices)
    # Summed without those that are kept: 1 minus their sum would be noise where the others are improbable.
    others = student.scatter(1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    difference = torch.cat([kept, others], 1).sub_(teacher)
    chosen = kept.exp()
    if reverse:
        loss = torch.linalg.vecdot(torch.cat([chosen, others.exp()], 1), difference)
        slope = difference - loss[:, None]
        gradient = None if factors is None else student.exp_().mul_(slope[:, -1:])
        of_chosen = chosen * slope[:, :-1]
    else:
        loss = -torch.linalg.vecdot(teacher.exp(), difference)
        # Exponents first: the others' mass may be too small to divide by.
        gradient = None if factors is None else student.exp() - student.sub_(difference[:, -1:]).exp_()
        of_chosen = chosen - teacher[:, :-1].exp()
    if gradient is not None and factors is not None:
        gradient.scatter_(1, indices, of_chosen).mul_(factors[:, None])
    return loss, gradient


def _scaled_log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature != 1.0:
        logits = logits.to(softmax_dtype(logits)) / temperature
    return logits.log_softmax(dim=-1, dtype=softmax_dtype(logits))


PASSES = Passes(_cross_entropy, _kl, Tensor.add_)
linear_cross_entropy = functools.partial(blocks.linear_cross_entropy, PASSES)
linear_kl = functools.partial(blocks.linear_kl, PASSES)
linear_top_kl = functools.partial(blocks.linear_top_kl, _top_kl, Tensor.add_)
