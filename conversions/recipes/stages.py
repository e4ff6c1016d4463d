"""The kinds of stages, and the settings of each. How they run is in `conversions/stages/<kind>.py`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ...kernels.errors import RnnzooError

__all__ = [
    "KINDS",
    "WINDOW_PARTS",
    "Align",
    "Allocate",
    "Calibrate",
    "Distilled",
    "Dpo",
    "EndToEnd",
    "Extend",
    "OwnData",
    "Sft",
    "Stage",
    "Train",
    "TrainedStage",
]


@dataclasses.dataclass
class Stage:
    """What every stage has.

    Attributes:
        name: its folder and its line in the results. kind: one of KINDS.
        share: of the recipe's training tokens; 0 for stages that do not train.
        steps: of a recipe that converts step by step, those that the stage is part of: "each", the "last", those "up to
            half" of the layers converted (the first step among them in any case), or "from half" on (the last as well).
    """

    name: str
    kind: str = ""
    share: float = 0.0
    steps: str = "each"
    own_rows: ClassVar[bool] = False  # whether it reads something else than rows of the recipe's training text

    def row_length(self, recipe: Any) -> int:
        """Tokens of a row that it reads."""
        return recipe.seq_len

    def trainable(self) -> str:
        """What it trains, in a word."""
        return "nothing"

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Settings that are one of a few words, and these words."""
        return {"steps": ("each", "last", "up to half", "from half")}

    def check(self, recipe: Any) -> None:
        """Refuses settings that do not fit each other or the recipe.

        Raises:
            RnnzooError: says what, without the name of the stage, which the caller puts before it.
        """
        if not 0 <= self.share <= 1:
            raise RnnzooError(f"share is {self.share:g}; it must lie between 0 and 1.")
        if self.own_rows and self.name in ("calibration", "training", "evaluation"):
            raise RnnzooError(f"{self.name} is the name of a part of the text; name the stage differently.")
        for name, allowed in self.choices().items():
            if getattr(self, name) not in allowed:
                raise RnnzooError(f"{name} is {getattr(self, name)!r}; expected one of {allowed}.")


@dataclasses.dataclass
class Measuring(Stage):
    """What stages have that divide the state budget by measured error; see `stages/allocation.py`.

    Attributes:
        feature_widths: candidates for the width of a layer's linear state, 0 besides; none: the student's own in all
            layers, so that only the windows are chosen.
        budget_context: tokens at which the budget pays for a layer of full attention, which then is a candidate too; 0:
            layers are kept only where `keep` says so, outside of the budget.
    """

    feature_widths: list[int] = dataclasses.field(default_factory=list)
    budget_context: int = 0

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if (wrong := [width for width in self.feature_widths if width < 0]) or self.budget_context < 0:
            value = wrong[0] if wrong else self.budget_context
            raise RnnzooError(f"feature_widths and budget_context cannot be negative; one is {value}.")
        if self.feature_widths and recipe.student_options.get("feature_map") != "prototype":
            raise RnnzooError("feature_widths are fitted for `feature_map: prototype`; student_options must have it.")
        if (self.feature_widths or self.budget_context) and recipe.state_budget is None:
            raise RnnzooError("feature_widths and budget_context divide a budget; give the recipe a state_budget.")


PARTS = ("windows", "features", "decay", "scale", "output")
WINDOW_PARTS = ("windows", "features")


@dataclasses.dataclass
class Calibrate(Measuring):
    """Closed form, no training: reads the recipe's `calibration_tokens`.

    Attributes:
        parts: of PARTS, which run in that order; none: those that the student has (`chosen`). Windows and features are
            for hedgehog layers, which need nothing else (on SmolLM2-135M, 8,000 tokens, a refit of the output raises
            their perplexity from 39 to 54); the others are for all, see `stages/closed_form.py`.
        ridge: how strongly the output is drawn to the weight that it replaces; 0: chosen for each layer by its error on
            text that it was not fitted to.
        correct: share of what the layers before left that a layer mends, from 0 to 1.
        weighting: of the tokens: "norm", by 1 / |h|^2 of the teacher's stream, as its norms see errors; "gradient", by
            the mean squared gradient of its loss; or "none".
    """

    kind: str = "calibrate"
    parts: list[str] = dataclasses.field(default_factory=list)
    ridge: float = 0.0
    correct: float = 0.5
    weighting: str = "norm"

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"weighting": ("norm", "gradient", "none")}

    def chosen(self, recipe: Any) -> list[str]:
        """The parts of a recipe's stage, in their order."""
        windowed = recipe.student == "hedgehog"
        usual = WINDOW_PARTS if windowed else ("decay", "scale", "output")
        chosen = [part for part in PARTS if part in (self.parts or usual)]
        return chosen if recipe.state_budget is not None or self.parts else [p for p in chosen if p != "windows"]

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise RnnzooError(f"parts has {unknown[0]!r}; expected some of {', '.join(PARTS)}.")
        if wrong := [part for part in self.parts if part in WINDOW_PARTS and recipe.student != "hedgehog"]:
            raise RnnzooError(f"the part {wrong[0]} is for hedgehog layers; the student is {recipe.student}.")
        if "windows" in self.parts and recipe.state_budget is None:
            raise RnnzooError("the part windows divides a budget; give the recipe a state_budget.")
        if self.ridge < 0:
            raise RnnzooError(f"ridge is {self.ridge:g}; it cannot be negative.")
        if not 0 <= self.correct <= 1:
            raise RnnzooError(f"correct is {self.correct:g}; it must lie between 0 and 1.")


@dataclasses.dataclass
class Allocate(Stage):
    """The windows of a trained student measured again: tokens move to the heads where they now remove more error.

    Weights and feature widths stay, and so does the state budget; reads the recipe's `calibration_tokens`.
    """

    kind: str = "allocate"

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        options = recipe.student_options
        if recipe.student != "hedgehog" or options.get("feature_map") != "prototype" or recipe.state_budget is None:
            raise RnnzooError(
                "an allocate stage is for hedgehog layers with `feature_map: prototype` and a state_budget."
            )


@dataclasses.dataclass
class TrainedStage(Stage):
    """What stages with an optimiser have, which is AdamW.

    Attributes:
        lr: peak learning rate of matrices that came from the teacher. new_lr: of parameters that did not.
        schedule: "cosine", "linear" or "constant", after `warmup` (share of the steps).
        min_lr: where cosine and linear schedules end.
        beta1, beta2, weight_decay: of AdamW. max_grad_norm: gradients of a step are scaled to this norm at most.
        window_dropout: probability, for every row, that a layer with an exact window beside its linear state loses the
            window or a part of it, so that the state does not go unused; see `stages/window_dropout.py`.
    """

    lr: float = 1e-4
    new_lr: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    window_dropout: float = 0.0

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"schedule": ("cosine", "linear", "constant")}

    def takes(self, recipe: Any, rows: int) -> bool:
        """Whether it has something to train on, where `rows` of the text are its share."""
        return rows > 0

    def rate(self, what: str) -> float:
        """Peak learning rate of parameters that are "new", of the "mixers", of kept "attention", or of the "rest"."""
        return self.new_lr if what == "new" else self.lr

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        for name in ("warmup", "window_dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise RnnzooError(f"{name} is {getattr(self, name):g}; it must lie between 0 and 1.")
        for name in ("lr", "new_lr", "min_lr", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise RnnzooError(f"{name} is {getattr(self, name):g}; it cannot be negative.")


@dataclasses.dataclass
class Align(TrainedStage):
    """Each mixer learns what its teacher layer does, on its own; the loss is a mean over the layers.

    Attributes:
        target: the layers' "outputs"; the outputs of their "heads", before the output projection; or their "matrices",
            with which values are summed (softmax(QK^T) of attention).
        loss: of the difference: "relative", its square over the target's; "mse", its mean square; "norm", the mean over
            tokens of ||.||_2 / sqrt(width), of matrices the mean over heads of ||.||_F.
        weight: factor of the loss.
        inputs: of the mixers: hidden states of the "teacher", or those that the "student" makes itself; no gradient
            goes from a layer into the one before.
        order: all layers in "parallel", or "sequential", one after the other with an equal part of the steps each.
        trains: what is "new" in the converted "mixers", or all of them; "features": what is new, but no decay.
    """

    kind: str = "align"
    target: str = "outputs"
    loss: str = "relative"
    weight: float = 1.0
    inputs: str = "teacher"
    order: str = "parallel"
    trains: str = "new"

    def trainable(self) -> str:
        return {"new": "new parameters", "features": "new features", "mixers": "mixers"}[self.trains]

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {
            "target": ("matrices", "heads", "outputs"),
            "loss": ("relative", "mse", "norm"),
            "inputs": ("teacher", "student"),
            "order": ("parallel", "sequential"),
            "trains": ("new", "features", "mixers"),
        }

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if self.weight <= 0:
            raise RnnzooError(f"weight is {self.weight:g}; it must be positive.")


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


KINDS: dict[str, type[Stage]] = {cls.kind: cls for cls in (Calibrate, Allocate, Align, Train, Extend, Sft, Dpo)}
