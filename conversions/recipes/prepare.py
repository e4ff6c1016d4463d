"""A recipe fitted to one teacher and to what the user asked for, checked before anything is written."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from ...kernels.errors import RnnzooError
from ...zoo.core.registry import mixer_class
from ..data import check_sequence_length
from ..ranking import load_ranking
from ..stages import Stage
from ..student import layer_types, student_config
from ..teachers import TeacherRef
from .keep import check_ranking, kept_layers, needs_ranking, stage_tokens
from .load import check_recipe, load_recipe
from .recipe import Recipe

__all__ = ["check_inputs", "check_offload", "check_processes", "prepare_recipe"]


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
    recipe = load_recipe(name)
    if student is not None and student != recipe.student:
        recipe = _with_student(recipe, student)
    given = {"keep": keep, "state_budget": state_budget, "tokens": tokens, "seq_len": seq_len}
    given |= {"batch_tokens": batch_tokens}
    recipe = dataclasses.replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if seq_len is None:
        recipe.seq_len = min(recipe.seq_len, teacher.config.max_position_embeddings)
    check_sequence_length(recipe.seq_len, teacher.config, f"The teacher {teacher.name}")
    if state_budget is not None and not any(stage.divides_budget(recipe) for stage in recipe.stages):
        raise RnnzooError(
            f"--state-budget divides windows among the layers, and no stage of the recipe {recipe.name} does that: its "
            "state has a fixed size."
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
    config = student_config(teacher, recipe, types)
    for stage in recipe.stages:
        with named(stage, recipe):
            stage.check_student(recipe, teacher, config, dtype)
    return recipe


def _with_student(recipe: Recipe, student: str) -> Recipe:
    mixer = mixer_class(student)
    if not mixer.starts_from_attention():
        raise RnnzooError(
            f"A '{student}' layer cannot be started from an attention layer; `rnnzoo list` says which can."
        )
    stages = [found for stage in recipe.stages if (found := stage.for_student(student)) is not None]
    recipe = dataclasses.replace(recipe, student=student, student_options={}, stages=stages)
    divided = any(stage.divides_budget(recipe) for stage in stages)
    return recipe if divided else dataclasses.replace(recipe, state_budget=None)


@contextlib.contextmanager
def named(stage: Stage, recipe: Recipe) -> Iterator[None]:
    """Puts the names of recipe and stage before what a stage refuses."""
    try:
        yield
    except RnnzooError as error:
        raise RnnzooError(f"The recipe {recipe.name}, stage {stage.name}: {error}") from error


def check_processes(recipe: Recipe, teacher: TeacherRef, count: int) -> None:
    """Refuses a recipe whose steps cannot be divided among `count` processes.

    Raises:
        RnnzooError: names what would do.
    """
    for stage in recipe.stages:
        for tokens in stage_tokens(recipe, stage, teacher.config.num_hidden_layers):
            stage.check_processes(recipe, tokens, count)


def check_inputs(recipe: Recipe, teacher: TeacherRef, chat_data: list[str] | None, look: bool) -> dict[str, Any]:
    """Looks at what the stages read besides the text; returns what identifies it, for the run's request.

    Args:
        chat_data: sources of chats and preferences for stages that name none. look: at the data as well; it is in the
            run already where one goes on.
    Raises:
        RnnzooError: names the stage.
    """
    found: dict[str, Any] = {}
    for stage in recipe.stages:
        with named(stage, recipe):
            for what, identity in stage.check_inputs(recipe, teacher, chat_data, look).items():
                found.setdefault(what, {})[stage.name] = identity
    if chat_data:
        if not any(stage.reads_chat_data() for stage in recipe.stages):
            raise RnnzooError(
                f"--chat-data is for stages of kind sft and dpo without data of their own, and the recipe "
                f"{recipe.name} has none; leave it out."
            )
        found["chat_data"] = chat_data
    return found


def check_offload(recipe: Recipe, data: list[str] | None, processes: int) -> None:
    """Refuses what needs the whole model.

    Raises:
        RnnzooError: says which part, and what to do.
    """
    if processes > 1:
        raise RnnzooError("--offload works in one process; leave torchrun out, or --offload.")
    if data is None:
        raise RnnzooError("--offload needs --data: the default text is in part sampled from the whole teacher.")
    if needs_ranking(recipe.keep) and not recipe.ranking:
        raise RnnzooError(f"keep {recipe.keep} ranks the layers with the whole model; with --offload give --ranking.")
    if recipe.progressive:
        raise RnnzooError(f"The recipe {recipe.name} converts step by step, which --offload cannot; leave one of them.")
    if mixer_class(recipe.student).shared is not mixer_class("full_attention").shared:
        raise RnnzooError(
            f"Layers of {recipe.student} share parameters, which --offload cannot; choose another student."
        )
    for stage in recipe.stages:
        if why := stage.whole_model_because(recipe):
            raise RnnzooError(
                f"With --offload one layer is in memory at a time, but the stage {stage.name} of the recipe "
                f"{recipe.name} {why}; use a recipe such as layerwise, or leave --offload out."
            )
