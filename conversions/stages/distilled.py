"""What stages have in common that learn from a teacher's predictions, asked at every step or kept from one pass.

N tokens, K kept classes, V vocabulary. Teachers with the same tokenizer may have heads with unused rows at the end, as
many as one likes; classes that only one of the two has are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import RnnzooError
from ...kernels.losses import linear_cross_entropy, linear_kl, linear_top_kl
from ...zoo.core.configuration import RecurrentConfig
from ..context import StageContext
from ..recipes import Recipe
from ..student import zoo_teacher
from ..teachers import TeacherRef, resolve_teacher
from .end_to_end import EndToEnd

__all__ = ["Distilled", "Likeliest", "Whole", "distillation_loss", "teacher_model_of"]


@dataclass
class Distilled(EndToEnd):
    """What stages have that learn from the teacher's predictions, from the text, or from both.

    Attributes:
        kl, reverse_kl, ce: weights of KL(teacher || student), of KL(student || teacher) and of cross-entropy, all per
            token.
        labels: of the cross-entropy: "text", or "teacher" for the teacher's most likely token.
        z_loss: weight of logsumexp^2.
        teacher: another teacher than the one that is converted, of any width but with the same tokenizer.
    """

    kl: float = 1.0
    reverse_kl: float = 0.0
    ce: float = 0.0
    labels: str = "text"
    z_loss: float = 0.0
    teacher: str | None = None

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"labels": ("text", "teacher")}

    def asks_teacher(self) -> bool:
        return bool(self.kl or self.reverse_kl or (self.ce and self.labels == "teacher"))

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        weights = {"kl": self.kl, "reverse_kl": self.reverse_kl, "ce": self.ce}
        for name, weight in weights.items():
            if weight < 0:
                raise RnnzooError(f"{name} is {weight:g}; the weight of a loss cannot be negative.")
        if not any(weights.values()):
            raise RnnzooError("kl, reverse_kl and ce are all 0, so there is nothing to learn; give one a weight.")
        if self.teacher is not None and not self.asks_teacher():
            raise RnnzooError(f"the teacher {self.teacher} is not asked: kl and reverse_kl are 0 and labels is text.")

    def other_teacher(self, recipe: Recipe) -> TeacherRef | None:
        """The stage's own teacher; reads no weights."""
        return None if self.teacher is None else resolve_teacher(self.teacher)

    def check_student(self, recipe: Recipe, teacher: TeacherRef, config: RecurrentConfig, dtype: torch.dtype) -> None:
        super().check_student(recipe, teacher, config, dtype)
        self.other_teacher(recipe)

    def check_inputs(
        self, recipe: Recipe, teacher: TeacherRef, chat_data: list[str] | None, look: bool
    ) -> dict[str, Any]:
        if (other := self.other_teacher(recipe)) is None or not recipe.tokens:
            return {}
        check_same_tokenizer(other, teacher)
        return {"teachers": other.sha}

    def learns_from(self) -> list[str]:
        losses = [f"{self.kl:g} x KL(teacher, student)"] if self.kl else []
        if self.reverse_kl:
            losses.append(f"{self.reverse_kl:g} x KL(student, teacher)")
        if self.ce:
            target = "the text" if self.labels == "text" else "the teacher's likeliest token"
            losses.append(f"{self.ce:g} x cross-entropy with {target}")
        if self.z_loss:
            losses.append(f"{self.z_loss:g} x logsumexp squared")
        return [" + ".join(losses)]


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
    stage: Distilled, hidden: Tensor, head: Any, teacher: Whole | Likeliest | None, labels: Tensor
) -> Tensor:
    """kl * KL(teacher || student) + reverse_kl * KL(student || teacher) + ce * cross-entropy, each a mean over tokens.

    Args:
        hidden: (N, D), the student's final hidden states. head: its head.
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


def teacher_model_of(context: StageContext, stage: Distilled) -> Any:
    """The teacher of a stage in the zoo's block, every layer attention, in the dtype to compute in."""
    if stage.teacher is None:
        return context.teacher_model
    found = resolve_teacher(stage.teacher)
    return zoo_teacher(found, found.load(context.compute_dtype), context.compute_dtype)


def check_same_tokenizer(other: TeacherRef, teacher: TeacherRef) -> None:
    """Refuses a teacher whose tokens are not those of the teacher that is converted.

    Raises:
        RnnzooError: names a token in which they differ.
    """
    theirs, ours = other.tokenizer().get_vocab(), teacher.tokenizer().get_vocab()
    if theirs == ours:
        return
    differing = min((token for token in {*theirs, *ours} if theirs.get(token) != ours.get(token)), key=_place(ours))
    numbers = [f"number {vocab[differing]}" if differing in vocab else "unknown" for vocab in (theirs, ours)]
    raise RnnzooError(
        f"the teacher {other.name} has another tokenizer than {teacher.name} (the token {differing!r} is {numbers[0]} "
        f"to the one and {numbers[1]} to the other), so that their predictions cannot be compared; choose one of the "
        "same family."
    )


def _place(vocabulary: dict[str, int]) -> Any:
    return lambda token: (vocabulary.get(token, len(vocabulary)), token)
