"""A recipe fitted to one teacher and to what the user asked for, checked before anything is written."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from ..kernels.errors import RnnzooError
from ..zoo.core.registry import mixer_class
from .budget import check_budget
from .processes import rows_per_step
from .recipes import Recipe, check_recipe, keep_steps, kept_layers, load_recipe, parse_keep
from .recipes.keep import check_ranking, needs_ranking
from .recipes.stages import WINDOW_PARTS, Align, Allocate, Calibrate, OwnData, Stage, TrainedStage
from .selection import load_ranking
from .stage_inputs import check_end_to_end
from .stages.calibrate import check_parts
from .stages.layer_targets import check_target
from .stages.window_dropout import check_window_dropout
from .student import layer_types, student_config
from .teachers import TeacherRef

if TYPE_CHECKING:
    from ..zoo.core.configuration import RecurrentConfig

__all__ = ["check_batches", "check_stages", "prepare_recipe", "stage_steps", "stage_tokens"]


def prepare_recipe(
    name: str,
    teacher: TeacherRef,
    *,
    student: str | None = None,
    keep: str | None = None,
    state_budget: int | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_tokens: int | None = None,
    ranking: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Recipe:
    """A recipe with the user's own values, checked against the teacher.

    Args:
        student: another mixer than the recipe's. What is made for the recipe's own falls away: its options, and the
            state budget with the parts of the closed-form stage that divide it, where the mixer has no windows.
        ranking: file of a ranking of the layers, for `keep: best ...`.

    Raises:
        RnnzooError: an unknown or wrong recipe, or values that do not fit the teacher.
    """
    from .data import check_sequence_length

    recipe = load_recipe(name)
    if student is not None and student != recipe.student:
        recipe = _with_student(recipe, student)
    given = {"keep": keep, "state_budget": state_budget, "tokens": tokens, "seq_len": seq_len}
    given |= {"batch_tokens": batch_tokens}
    recipe = dataclasses.replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if seq_len is None:
        recipe.seq_len = min(recipe.seq_len, teacher.config.max_position_embeddings)
    check_sequence_length(recipe.seq_len, teacher.config, f"The teacher {teacher.name}")
    if state_budget is not None and recipe.student != "hedgehog":
        raise RnnzooError(
            f"--state-budget divides windows, but the recipe {recipe.name} has none: its state has a fixed size."
        )
    check_recipe(recipe, f"The recipe {recipe.name}")
    layers = teacher.config.num_hidden_layers
    if ranking is not None:
        if not needs_ranking(recipe.keep):
            raise RnnzooError(f"--ranking is for `--keep 'best ...'`, but the recipe keeps {recipe.keep}.")
        recipe.ranking = load_ranking(ranking, teacher, recipe.student)
    if recipe.ranking:
        check_ranking(recipe.ranking, layers, f"The recipe {recipe.name}")
    kept = kept_layers(recipe, layers)
    if len(kept) == layers:
        raise RnnzooError(f"keep {recipe.keep} keeps every layer as attention; leave at least one to convert.")
    types = layer_types(teacher, recipe, kept)
    check_stages(recipe, student_config(teacher, recipe, types))
    if recipe.state_budget is not None:
        check_budget(teacher, recipe, types, dtype)
    return recipe


def _with_student(recipe: Recipe, student: str) -> Recipe:
    mixer = mixer_class(student)
    if not mixer.starts_from_attention():
        raise RnnzooError(
            f"A '{student}' layer cannot be started from an attention layer; `rnnzoo list` says which can."
        )
    if student == "hedgehog":
        return dataclasses.replace(recipe, student=student, student_options={})
    stages = [found for stage in recipe.stages if (found := _without_windows(stage)) is not None]
    return dataclasses.replace(recipe, student=student, student_options={}, stages=stages, state_budget=None)


def _without_windows(stage: Stage) -> Stage | None:
    """A calibrate stage less what divides a budget, as it is for a student of fixed size; None if nothing is left."""
    if isinstance(stage, Allocate):
        return None
    if not isinstance(stage, Calibrate):
        return stage
    parts = [part for part in stage.parts if part not in WINDOW_PARTS]
    if stage.parts and not parts:
        return None
    return dataclasses.replace(stage, parts=parts, feature_widths=[], budget_context=0)


def check_stages(recipe: Recipe, config: RecurrentConfig) -> None:
    """Refuses settings of stages that the student's layers cannot meet.

    Args:
        config: of the student.
    Raises:
        RnnzooError: names the stage, and what would do.
    """
    for stage in recipe.stages:
        try:
            if isinstance(stage, Align):
                check_target(stage.target, recipe.student, config)
            if isinstance(stage, Calibrate):
                check_parts(stage, recipe.student)
            if isinstance(stage, TrainedStage) and stage.window_dropout:
                check_window_dropout(recipe.student)
            check_end_to_end(stage, recipe, config)
        except RnnzooError as error:
            raise RnnzooError(f"The recipe {recipe.name}, stage {stage.name}: {error}") from None


def check_batches(recipe: Recipe, teacher: TeacherRef, count: int) -> None:
    """Refuses a recipe whose steps cannot be divided among `count` processes.

    Raises:
        RnnzooError: names what would do.
    """
    for stage in recipe.stages:
        for tokens in stage_tokens(recipe, stage, teacher.config.num_hidden_layers):
            if tokens and isinstance(stage, TrainedStage) and not isinstance(stage, OwnData):
                length = stage.row_length(recipe)
                rows_per_step(recipe.batch_tokens, length, max(1, tokens // length), count)


def stage_steps(recipe: Recipe, stage: Stage, layers: int) -> list[bool]:
    """Of which of the `keep_steps` a stage is part."""
    kept = [len(parse_keep(keep, layers)) for keep in keep_steps(recipe, layers)]
    last, half = len(kept) - 1, layers // 2
    return [
        {
            "each": True,
            "last": number == last,
            "up to half": left >= half or number == 0,
            "from half": left <= half or number == last,
        }[stage.steps]
        for number, left in enumerate(kept)
    ]


def stage_tokens(recipe: Recipe, stage: Stage, layers: int) -> list[int]:
    """Training tokens of a stage at each of the `keep_steps`: its share in equal parts, 0 where it has no part."""
    part = stage_steps(recipe, stage, layers)
    return [int(recipe.tokens * stage.share / sum(part)) if chosen else 0 for chosen in part]
