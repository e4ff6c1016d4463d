"""Stages that train the whole model: on text, against a teacher, on chats and on preferences."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ...kernels.errors import RnnzooError
from .stage_base import TrainedStage

__all__ = ["Distilled", "Dpo", "EndToEnd", "Extend", "OwnData", "Sft", "Train"]


@dataclasses.dataclass
class EndToEnd(TrainedStage):
    """What stages have that train the whole model, not layers on their own.

    Attributes:
        trains: "mixers", those of "converted" layers alone, "all", or "lora": adapters of low rank (Hu et al. 2021) on
            the converted mixers, merged into their matrices when the stage ends; nothing else moves.
        lora_rank, lora_alpha: of the adapters, which add alpha / rank * B A. lora_targets: names of linear layers.
        rest_lr: of MLPs, norms and embeddings, where they are trained. attention_lr: of layers kept as attention. None:
            `lr`.
        epochs: how often each row is read, every time in another order. A stage on the training text keeps its share of
            the tokens all the same, so its text is so many times shorter.
    """

    trains: str = "mixers"
    rest_lr: float | None = None
    attention_lr: float | None = None
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: list[str] = dataclasses.field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    epochs: int = 1

    def asks_teacher(self) -> bool:
        """Whether the loss needs the teacher's predictions."""
        return False

    def trainable(self) -> str:
        return f"LoRA of rank {self.lora_rank}" if self.trains == "lora" else self.trains

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"trains": ("mixers", "converted", "all", "lora")}

    def rate(self, what: str) -> float:
        rate = {"attention": self.attention_lr, "rest": self.rest_lr}.get(what)
        return super().rate(what) if rate is None else rate

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if self.epochs < 1:
            raise RnnzooError(f"epochs is {self.epochs}; it must be 1 or more.")
        if self.trains == "lora" and (self.lora_rank < 1 or not self.lora_targets):
            raise RnnzooError("LoRA needs a lora_rank of 1 or more and at least one name in lora_targets.")


@dataclasses.dataclass
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

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        weights = {"kl": self.kl, "reverse_kl": self.reverse_kl, "ce": self.ce}
        for name, weight in weights.items():
            if weight < 0:
                raise RnnzooError(f"{name} is {weight:g}; the weight of a loss cannot be negative.")
        if not any(weights.values()):
            raise RnnzooError("kl, reverse_kl and ce are all 0, so there is nothing to learn; give one a weight.")
        if self.teacher is not None and not self.asks_teacher():
            raise RnnzooError(f"the teacher {self.teacher} is not asked: kl and reverse_kl are 0 and labels is text.")


@dataclasses.dataclass
class Train(Distilled):
    """End to end on the training text.

    Attributes:
        cache_top_k: run the teacher once, before training, and keep so many of its largest log-probabilities a token;
            the divergences are then between these and the mass of all others. 0: run it at every step.
    """

    kind: str = "train"
    cache_top_k: int = 0

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if self.cache_top_k < 0 or (self.cache_top_k and not self.asks_teacher()):
            raise RnnzooError(
                f"cache_top_k is {self.cache_top_k}; it keeps predictions of the teacher, 0 or more a token, for kl, "
                "reverse_kl or labels: teacher."
            )


@dataclasses.dataclass
class Extend(Distilled):
    """Longer rows, read chunk by chunk with the state passed on, after Stuffed Mamba (2024, arXiv 2410.07145).

    Attributes:
        length: tokens of a row. chunk: of a forward pass.
        grad_chunks: chunks that the gradient goes back through, the state being cut from it between such groups.
        beyond: weight of cross-entropy on the text at positions that the teacher was not trained on.
    """

    kind: str = "extend"
    own_rows: ClassVar[bool] = True
    length: int = 16384
    chunk: int = 2048
    grad_chunks: int = 1
    beyond: float = 1.0

    def row_length(self, recipe: Any) -> int:
        return self.length

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if not 2 <= self.chunk <= self.length:
            raise RnnzooError(f"chunk is {self.chunk}; it must lie between 2 and length, which is {self.length}.")
        if self.grad_chunks < 1 or self.beyond < 0:
            raise RnnzooError("grad_chunks must be 1 or more, and beyond not negative.")


@dataclasses.dataclass
class OwnData(EndToEnd):
    """What stages have that read chats or preferences of their own, not the training text.

    Attributes:
        data: a file, a folder or a Hub dataset; None: what `--chat-data` gives.
        share: of the recipe's tokens, as much of the data as these are; 0: all of it, `epochs` times.
    """

    own_rows: ClassVar[bool] = True
    trains: str = "all"
    data: str | None = None

    def takes(self, recipe: Any, rows: int) -> bool:
        return recipe.tokens > 0


@dataclasses.dataclass
class Sft(OwnData):
    """Supervised fine-tuning on chats (TRL), as the tokenizer's chat template writes them.

    Attributes:
        loss_on: "assistant" for what the assistant says, wherever the template lets that be told apart, or "all".
    """

    kind: str = "sft"
    lr: float = 2e-5
    new_lr: float = 2e-5
    loss_on: str = "assistant"

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"loss_on": ("assistant", "all")}


@dataclasses.dataclass
class Dpo(OwnData):
    """Direct preference optimisation (Rafailov et al. 2023, TRL) against the student as the stage found it.

    Attributes:
        beta: how much the student is held to where it was. batch: pairs in an optimiser step.
    """

    kind: str = "dpo"
    lr: float = 5e-7
    new_lr: float = 5e-7
    beta: float = 0.01
    batch: int = 8

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if self.beta <= 0 or self.batch < 1:
            raise RnnzooError(f"beta is {self.beta:g} and batch {self.batch}; both must be positive.")
