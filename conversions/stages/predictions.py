"""What the teacher predicts: asked at every step, or its likeliest tokens kept from one pass before training.

N tokens, K kept classes, V vocabulary. Teachers with the same tokenizer may have heads with unused rows at the end, as
many as one likes; classes that only one of the two has are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.losses import linear_cross_entropy, linear_kl, linear_top_kl

__all__ = ["Likeliest", "Whole", "distillation_loss"]


@dataclass
class Whole:
    """A teacher's final hidden states (N, Dt) and its head (V, Dt)."""

    hidden: Tensor
    weight: Tensor

    def kl(self, hidden: Tensor, head: Any, **options: Any) -> Tensor:
        """The divergence of a student with these hidden states (N, D); options of `linear_kl`."""
        common = min(len(self.weight), len(head.weight))
        bias = None if head.bias is None else head.bias[:common]
        return linear_kl(hidden, head.weight[:common], self.hidden, self.weight[:common], student_bias=bias, **options)

    @torch.no_grad()
    def labels(self) -> Tensor:
        """(N,) the likeliest tokens, chunk by chunk."""
        return torch.cat([(rows @ self.weight.T).argmax(-1) for rows in self.hidden.split(256)])


@dataclass
class Likeliest:
    """A teacher's likeliest tokens (N, K), their log-probabilities (N, K), the log of the others' mass (N,)."""

    indices: Tensor
    log_probabilities: Tensor
    log_rest: Tensor

    def kl(self, hidden: Tensor, head: Any, **options: Any) -> Tensor:
        """As `Whole.kl`, over K + 1 classes; options of `linear_top_kl`."""
        kept = (self.indices, self.log_probabilities, self.log_rest)
        return linear_top_kl(hidden, head.weight, *kept, student_bias=head.bias, **options)

    def labels(self) -> Tensor:
        """(N,) the likeliest tokens."""
        return self.indices[:, 0].long()


def distillation_loss(
    stage: Any, hidden: Tensor, head: Any, teacher: Whole | Likeliest | None, labels: Tensor
) -> Tensor:
    """kl * KL(teacher || student) + reverse_kl * KL(student || teacher) + ce * cross-entropy, each a mean over tokens.

    Args:
        stage: settings of a `Distilled` stage. hidden: (N, D), the student's final hidden states. head: its head.
        labels: (N,) of the text, -100 where there is none.
    """
    loss = hidden.new_zeros((), dtype=torch.float32)
    for weight, reverse in ((stage.kl, False), (stage.reverse_kl, True)):
        if weight:
            loss = loss + weight * teacher.kl(hidden, head, reverse=reverse)
    if stage.ce:
        labels = teacher.labels() if stage.labels == "teacher" else labels
        loss = loss + stage.ce * linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, z_loss=stage.z_loss)
    return loss
