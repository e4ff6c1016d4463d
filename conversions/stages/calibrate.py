"""Calibration in closed form, on a few sequences of text: windows, features, and the parts that every student has."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.errors import RnnzooError
from ...zoo.core.configuration import RecurrentConfig
from ...zoo.core.registry import ATTENTION_TYPES, mixer_class
from ..context import StageContext, StageRun
from ..data import PackedTokens
from ..evaluation.scoring import token_log_probs
from ..fit.closed_form import ClosedForm, Stream, fit_layer
from ..fit.observe import sample_rows, token_weights
from ..fit.scores import ScoreFit
from ..layers import Layers, open_layers
from ..precision import mixed_precision
from ..recipes import Recipe
from ..student import budget_of
from ..teachers import TeacherRef
from .base import Cost, Stage

__all__ = ["Calibrate", "fit_layers", "loss_behind"]

PARTS = ("windows", "features", "scores", "decay", "values", "scale", "output")
WINDOW_PARTS = ("windows", "features", "scores")


@dataclass
class Calibrate(Stage):
    """Closed form, no training: reads the recipe's `calibration_tokens`.

    Attributes:
        feature_widths: candidates for the width of a layer's linear state, 0 besides; none: the student's own in all
            layers, so that only the windows are chosen.
        budget_context: tokens at which the budget pays for a layer of full attention, which then is a candidate too; 0:
            layers are kept only where `keep` says so, outside of the budget.
        parts: of PARTS, which run in that order; none: those that the student has (`chosen`). Windows, features and
            scores are for mixers with windows among which a budget can be divided, which need nothing else (on
            SmolLM2-135M, 8,000 tokens, a refit of the output raises their perplexity from 39 to 54), and scores for
            those that choose by them what they keep (`fit/scores.py`); the others are for all, see
            `fit/closed_form.py`. "values" has to be asked for, and passes over layers that are not linear in their
            values.
        ridge: how strongly the output is drawn to the weight that it replaces; 0: chosen for each layer by its error on
            text that it was not fitted to.
        correct: share of what the layers before left that a layer mends, from 0 to 1.
        weighting: of the tokens: "norm", by 1 / |h|^2 of the teacher's stream, as its norms see errors; "gradient", by
            the mean squared gradient of its loss; or "none".
    """

    kind: str = "calibrate"
    feature_widths: list[int] = field(default_factory=list)
    budget_context: int = 0
    parts: list[str] = field(default_factory=list)
    ridge: float = 0.0
    correct: float = 0.5
    weighting: str = "norm"

    def choices(self) -> dict[str, tuple[str, ...]]:
        return super().choices() | {"weighting": ("norm", "gradient", "none")}

    def chosen(self, recipe: Recipe) -> list[str]:
        """The parts of a recipe's stage, in their order."""
        mixer, usual = mixer_class(recipe.student), ("decay", "scale", "output")
        if mixer.divides_budget:
            usual = ("windows", "scores" if mixer.keeps_by_score else "features")
        chosen = [part for part in PARTS if part in (self.parts or usual)]
        return chosen if recipe.state_budget is not None or self.parts else [p for p in chosen if p != "windows"]

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if (wrong := [width for width in self.feature_widths if width < 0]) or self.budget_context < 0:
            value = wrong[0] if wrong else self.budget_context
            raise RnnzooError(f"feature_widths and budget_context cannot be negative; one is {value}.")
        mixer = mixer_class(recipe.student)
        if self.feature_widths and (reason := mixer.fixed_widths_because(recipe.student_options)):
            raise RnnzooError(f"feature_widths cannot be chosen: {reason}.")
        if (self.feature_widths or self.budget_context) and recipe.state_budget is None:
            raise RnnzooError("feature_widths and budget_context divide a budget; give the recipe a state_budget.")
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise RnnzooError(f"parts has {unknown[0]!r}; expected some of {', '.join(PARTS)}.")
        if wrong := [part for part in self.parts if part in WINDOW_PARTS and not mixer.divides_budget]:
            raise RnnzooError(
                f"the part {wrong[0]} is for layers with windows of chosen lengths; '{recipe.student}' has none."
            )
        if "scores" in self.parts and not mixer.keeps_by_score:
            raise RnnzooError(
                f"the part scores is for layers that keep tokens by a score; '{recipe.student}' has none."
            )
        if "windows" in self.parts and recipe.state_budget is None:
            raise RnnzooError("the part windows divides a budget; give the recipe a state_budget.")
        if self.ridge < 0:
            raise RnnzooError(f"ridge is {self.ridge:g}; it cannot be negative.")
        if not 0 <= self.correct <= 1:
            raise RnnzooError(f"correct is {self.correct:g}; it must lie between 0 and 1.")

    def for_student(self, student: str) -> Stage | None:
        """Less what divides a budget, where the student has no windows."""
        if mixer_class(student).divides_budget:
            return self
        parts = [part for part in self.parts if part not in WINDOW_PARTS]
        if self.parts and not parts:
            return None
        return dataclasses.replace(self, parts=parts, feature_widths=[], budget_context=0)

    def check_student(self, recipe: Recipe, teacher: TeacherRef, config: RecurrentConfig, dtype: torch.dtype) -> None:
        # By default a decay is passed over where there is none to set.
        if "decay" in self.parts and not mixer_class(recipe.student).has_decay():
            raise RnnzooError(f"{recipe.student} layers have no decay to set; leave the part decay out.")
        if self.divides_budget(recipe):
            budget_of(teacher, recipe, dtype, self.feature_widths).check(config.layer_types)

    def whole_model_because(self, recipe: Recipe) -> str | None:
        if self.divides_budget(recipe):
            return "divides a state budget by the gradient of the loss"
        return "weights tokens by the gradient of the loss" if self.weighting == "gradient" else None

    def tokens_read(self, recipe: Recipe, chat_data: list[str] | None = None) -> int | None:
        return recipe.calibration_tokens

    def cost(self) -> Cost:
        return Cost(teacher=3.0)

    def describe(self, recipe: Recipe) -> list[str]:
        read = f"closed form, no training: {recipe.calibration_tokens:,} tokens are read once"
        return [read, *super().describe(recipe)]

    def divides_budget(self, recipe: Recipe) -> bool:
        return "windows" in self.chosen(recipe)

    def divide_budget(self, context: StageContext, types: list[str]) -> dict[str, Any]:
        report = lambda done, total: context.progress("allocate", done, total, {})  # noqa: E731
        _, record = self._spend(context, types, report)
        return record

    def for_ranking(self) -> Stage | None:
        """Each mixer is to stand in for its layer alone, so none mends what others would have left."""
        return dataclasses.replace(self, budget_context=0, correct=0.0)

    def prepare(self, context: StageContext) -> None:
        context.calibration()

    def run(self, context: StageContext, student: Any, stage_run: StageRun) -> tuple[Any, dict[str, Any]]:
        """Windows for all converted layers; all else for those converted since the last calibration."""
        started = time.monotonic()
        parts = self.chosen(context.recipe)
        data = context.calibration()
        record: dict[str, Any] = {"parts": parts}
        if "windows" in parts:
            student, record["allocation"] = self._with_state(context, student, stage_run)
        layers = open_layers(context, student, stage_run)
        how = ClosedForm([name for name in parts if name not in WINDOW_PARTS], self.ridge, self.correct, self.weighting)
        # What layers gain one by one need not be a gain for the model: of three rows or more the last judges that.
        fitted = judge = data
        if len(data) >= 3:
            fitted, judge = data.rows(0, len(data) - 1), data.rows(len(data) - 1, 1)
        losses = fit_layers(
            layers,
            fitted,
            how,
            judge=judge,
            features=context.seed if "features" in parts else None,
            scores="scores" in parts,
            only=stage_run.fresh,
            weights=gradient_weights(context, fitted, stage_run)
            if how.parts and self.weighting == "gradient"
            else None,
            bf16=context.bf16,
            report=lambda done, total: context.progress(stage_run.name, done, total, {}),
        )
        if losses is not None:
            record |= judged(layers, losses, parts)
        return layers.student, {"tokens": data.num_tokens, "seconds": round(time.monotonic() - started, 1)} | record

    def _with_state(self, context: StageContext, student: Any, stage_run: StageRun) -> tuple[Any, dict[str, Any]]:
        """The student with its budget divided among its layers, all that is trained as it was, and a record of it.

        Layers that are not new in this part keep the width of their linear state.
        """
        types, fixed = student.config.layer_types, {}
        old = [i for i, kind in enumerate(types) if kind not in ATTENTION_TYPES and i not in stage_run.fresh]
        if self.feature_widths:
            widths = mixer_class(context.recipe.student).state_widths(student.config)
            fixed = {i: widths[i] for i in old}
        report = lambda done, total: context.progress(stage_run.name, done, total, {})  # noqa: E731
        config, record = self._spend(context, types, report, fixed, old)
        return context.rebuilt(config, student), record

    def _spend(self, context: StageContext, types: list[str], report: Any, *others: Any) -> Any:
        budget = budget_of(context.teacher, context.recipe, context.dtype, self.feature_widths, self.budget_context)
        return budget.spend(context.teacher_model, types, context.calibration(), context.seed, *others, progress=report)


def judged(layers: Layers, losses: tuple[float, float], parts: list[str]) -> dict[str, Any]:
    """Takes fits back where they have made the student's loss larger.

    Returns:
        Mean errors of the layers and the losses, before and after, whether the fits were kept and, where values were
        to be refitted, in how many layers they are.
    """
    reports = layers.reports()
    if not (kept := losses[1] <= losses[0]):
        layers.take_back()
    errors = [sum(layer[name] for layer in reports) / max(1, len(reports)) for name in ("before", "after")]
    found = [value if math.isfinite(value) else None for value in (*errors, *losses)]
    names = ("error_before", "error_after", "loss_before", "loss_after")
    record = dict(zip(names, found, strict=True)) | {"fits_kept": kept}
    return record | ({"values_refitted": sum(layer["values"] for layer in reports)} if "values" in parts else {})


@torch.no_grad()
def fit_layers(
    layers: Layers,
    data: PackedTokens,
    how: ClosedForm,
    *,
    judge: PackedTokens | None = None,
    features: int | None = None,
    scores: bool = False,
    only: Container[int] | None = None,
    weights: torch.Tensor | None = None,
    bf16: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, float] | None:
    """Fits the converted layers in closed form, one after the other, each on what those before it really give.

    Args:
        data: rows of text. judge: rows on which the student's loss is measured.
        features: a seed, where features are fitted too, to the first row as one document.
        scores: whether scores are fitted too, to the rows as one document each, and to repetitions of their halves.
        only: layers to fit; None: all that are converted.
        weights: (layers, N, T), of the tokens in each layer's least squares; None: all alike.
        bf16: run the layers in bfloat16 where autocast does; sums are float64 in any case.
    Returns:
        The losses on `judge`, with all but the closed forms of `how`, and with these; None without either. Layers
        report their errors, see `fit_layer`.
    Raises:
        RnnzooError: a layer's outputs are not finite.
    """
    fitted, judging = ([rows[i] for i in range(len(rows))] if rows and how.parts else [] for rows in (data, judge))
    whole = [data[i] for i in range(len(data) if scores else 1)] if scores or features is not None else []
    whole = [row | {"seq_ids": torch.zeros_like(row["seq_ids"])} for row in whole]
    whole += [rows[i] for rows in ([data.repeated()] if scores else []) for i in range(len(rows))]
    streams = layers.streams(
        {
            "teacher": (True, fitted),
            "student": (False, fitted),
            "unfitted": (False, judging),
            "judged": (False, judging),
        }
        | {"whole": (True, whole)}
    )
    for number in range(layers.first, layers.count):
        chosen = layers.converted(number) and (only is None or number in only)
        found = None
        with layers.pair(number) as (teacher_block, student_block):
            fit = ScoreFit()
            for row, stream in enumerate(streams["whole"]):
                hidden = teacher_block.input_layernorm(stream.hidden)
                q, k, _ = teacher_block.mixer.proj.split(hidden) if chosen else (None, None, None)
                if chosen and features is not None and row == 0:
                    heads, rows = (q[0].float(), k[0].float()), sample_rows(q.shape[1], features)
                    student_block.mixer.fit_features(*heads, stream.ctx, rows, features)
                if chosen and scores:
                    turned = (stream.ctx.rotary.rotate(x, stream.ctx.positions)[0] for x in (q, k))
                    fit.add(hidden[0], *turned)
                stream.advance(teacher_block)
            if (weight := fit.solve()) is not None:
                student_block.mixer.set_scores(weight)
            if chosen and judging:
                layers.set_aside(number, student_block)
            with mixed_precision(layers.device, bf16):
                for stream in streams["unfitted"]:
                    stream.advance(student_block)
                if chosen and how.parts:
                    of_layer = None if weights is None else weights[number]
                    found = fit_layer(
                        teacher_block, student_block, how, streams["teacher"], streams["student"], of_layer
                    )
                for stream in [*streams["student"], *streams["judged"]]:
                    stream.advance(student_block)
                for stream in streams["teacher"] if found is None else ():
                    stream.advance(teacher_block)
            if found is not None and not math.isfinite(found["after"]):
                raise RnnzooError(
                    f"The outputs of the student's layer {number} are not finite on the calibration text; leave the "
                    "calibrate stage out, or choose another student."
                )
            layers.keep(number, student_block, None if found is None else {"layer": number} | found, streams)
        report(number + 1, layers.count)
    if not judging:
        return None
    with layers.head() as model:
        before, after = (loss_behind(model, streams[name], judging, bf16) for name in ("unfitted", "judged"))
    return before, after


@torch.no_grad()
def loss_behind(model: Any, streams: list[Stream], rows: Sequence[dict[str, torch.Tensor]], bf16: bool) -> float:
    """Mean cross-entropy per token of rows, in nats, behind the last layer; infinite where it is not a number.

    Args:
        model: of which final norm and head are used.
    """
    total, count = 0.0, 0
    with mixed_precision(streams[0].hidden.device, bf16):
        for stream, row in zip(streams, rows, strict=True):
            hidden = model.model.norm(stream.hidden)[0]
            ids, seq_ids = (row[name].to(hidden.device) for name in ("input_ids", "seq_ids"))
            within = seq_ids[1:] == seq_ids[:-1]
            total -= float(token_log_probs(model, hidden[:-1][within], ids[1:][within]).double().sum())
            count += int(within.sum())
    loss = total / max(1, count)
    return loss if math.isfinite(loss) else math.inf


def gradient_weights(context: StageContext, data: PackedTokens, stage_run: StageRun) -> torch.Tensor:
    """(layers, N, T), with a mean of 1 in every layer."""
    rows = []
    for number in range(len(data)):
        row = data[number]
        documents = row["seq_ids"] if len(row["seq_ids"].unique()) > 1 else None
        rows.append(token_weights(context.teacher_model, row["input_ids"], documents, context.seed + number))
        context.progress(stage_run.name, (number + 1) * data.seq_len, data.num_tokens, {})
    weights = torch.stack(rows, 1)
    return weights / weights.mean((1, 2), keepdim=True)
