"""Recipes read from YAML, and checked: every value of the right type, and the stages' settings against each other."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

from ...kernels.errors import RnnzooError
from ...zoo.core.registry import ATTENTION_TYPES, known_mixers
from ..stages import KINDS, Stage
from . import FOLDER
from .recipe import Recipe

__all__ = ["check_recipe", "load_recipe"]

RESERVED = ("data", "finished", "initialise", "layers", "model", "student")


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or by the path of a YAML file.

    Raises:
        RnnzooError: unknown, unreadable, or with a wrong key or type.
    """
    names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{name}.yaml" if name in names else Path(name).expanduser()
    if not path.is_file():
        raise RnnzooError(
            f"There is no recipe {name!r}; known are {', '.join(names)}, or give the path of a YAML file."
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RnnzooError(f"{path}{line} is not readable YAML: {what}.") from error
    if not isinstance(raw, dict):
        raise RnnzooError(f"{path} holds a {type(raw).__name__}; expected a mapping with name, student and stages.")
    stages = raw.pop("stages", None)
    if not isinstance(stages, list) or not stages:
        raise RnnzooError(f"{path}: stages must be a list of at least one stage.")
    raw.setdefault("name", path.stem)
    built = [_stage(stage, f"{path.name}, stage {number}") for number, stage in enumerate(stages, 1)]
    recipe = _checked(Recipe, raw | {"stages": built}, path.name)
    check_recipe(recipe, path.name)
    return recipe


def _stage(raw: Any, where: str) -> Stage:
    if not isinstance(raw, dict):
        raise RnnzooError(f"{where} is a {type(raw).__name__}; expected a mapping.")
    if raw.get("kind") not in KINDS:
        said = f": kind is {raw['kind']!r}" if "kind" in raw else " lacks the key 'kind'"
        raise RnnzooError(f"{where}{said}; expected one of {', '.join(KINDS)}.")
    return _checked(KINDS[raw["kind"]], raw, where)


def _checked(cls: type, raw: dict[Any, Any], where: str) -> Any:
    """The dataclass `cls` of these values; types are checked by the Hub's strict dataclasses, as of configurations."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(raw) - set(fields), key=str):
        raise RnnzooError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(fields)}.")
    for name, field in fields.items():
        if name not in raw and field.default is field.default_factory is dataclasses.MISSING:
            raise RnnzooError(f"{where} lacks the key {name!r}.")
    hints = get_type_hints(cls)
    for name, value in raw.items():
        kinds = {hints[name], *get_args(hints[name])}
        if kinds & {int, float} and isinstance(value := _number(value, kinds), float):
            if not math.isfinite(value):
                raise RnnzooError(f"{where}: {name} is {value!r}; expected a finite number.")
            if float not in kinds:
                raise RnnzooError(f"{where}: {name} is {value!r}; expected a whole number.")
        raw[name] = value
        try:
            type_validator(name, value, hints[name])
        except TypeError:
            raise RnnzooError(f"{where}: {name} is {value!r}; expected {fields[name].type}.") from None
    return cls(**raw)


def _number(value: Any, kinds: set[Any]) -> Any:
    """A number that YAML has read as another type, in its own: 1e-4, without a point, as text, 1e5 as a fraction."""
    if float in kinds and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    if float in kinds and type(value) is int:
        return float(value)
    return int(value) if float not in kinds and isinstance(value, float) and value.is_integer() else value


def check_recipe(recipe: Recipe, where: str) -> None:
    """Refuses values that no conversion can work with.

    Raises:
        RnnzooError: begins with `where`.
    """
    students = [name for name in known_mixers() if name not in ATTENTION_TYPES]
    if recipe.student not in students:
        raise RnnzooError(f"{where}: there is no mixer {recipe.student!r}; known are {', '.join(students)}.")
    if recipe.progressive and recipe.stepwise:
        raise RnnzooError(f"{where}: progressive and stepwise are two ways to convert; choose one.")
    if len({stage.name for stage in recipe.stages}) != len(recipe.stages):
        raise RnnzooError(f"{where}: two stages have the same name; name them differently.")
    for stage in recipe.stages:
        if not re.fullmatch(r"[\w-]+", stage.name) or stage.name in RESERVED or stage.name.startswith("student-"):
            raise RnnzooError(
                f"{where}: a stage cannot be named {stage.name!r}; use letters, digits, - and _, and none of "
                f"{', '.join(RESERVED)}."
            )
        try:
            stage.check(recipe)
        except RnnzooError as error:
            raise RnnzooError(f"{where}, stage {stage.name}: {error}") from None
    if recipe.state_budget is not None and not any(stage.divides_budget(recipe) for stage in recipe.stages):
        raise RnnzooError(f"{where}: a state budget is divided by a stage of kind calibrate, and there is none.")
    if recipe.calibration_tokens < 1 or recipe.batch_tokens < 1 or recipe.tokens < 0:
        raise RnnzooError(f"{where}: batch_tokens and calibration_tokens must be positive, and tokens not negative.")
