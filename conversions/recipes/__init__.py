"""Recipes: YAML files that name a student mixer, the layers kept as attention, and the stages with their tokens.

name, description, source       who it is and where it comes from
student, student_options        the mixer, and fields of its configuration
keep                            layers that stay attention: none, a share such as 1/4, a list of numbers, first, last or
                                best with a number or a share, such as best 25%; see `keep.py`
ranking                         all layers, the most important first, for best; none: measured before the first stage
state_budget                    bytes of recurrent state in all, divided by measured error, see `stages.py`
seq_len, tokens, batch_tokens   length of a training sequence; training tokens in all; tokens of an optimiser step
calibration_tokens              text of the closed-form stage
progressive                     convert 1/4, 1/2, 3/4, 7/8 ... of the layers, with a run of the stages at each step
stepwise                        the same, but one layer more at each step
stages                          list of {name, kind, share, ...}, see `stages.py`
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import yaml

from ...kernels.errors import RnnzooError
from .keep import keep_steps, kept_layers, parse_keep
from .stages import KINDS, Calibrate, Stage

__all__ = [
    "Recipe",
    "check_recipe",
    "keep_steps",
    "kept_layers",
    "list_recipes",
    "load_recipe",
    "parse_keep",
]

FOLDER = Path(__file__).parent
RESERVED = ("data", "finished", "initialise", "model", "student")


@dataclasses.dataclass
class Recipe:
    """A recipe; the module's docstring says what its fields mean."""

    name: str
    student: str
    stages: list[Stage]
    description: str = ""
    source: str = ""
    student_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep: str = "none"
    ranking: list[int] = dataclasses.field(default_factory=list)
    state_budget: int | None = None
    seq_len: int = 2048
    tokens: int = 131072
    batch_tokens: int = 4096
    calibration_tokens: int = 6144
    progressive: bool = False
    stepwise: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def list_recipes() -> dict[str, str]:
    """Name -> one line about it."""
    return {file.stem: load_recipe(file.stem).description for file in sorted(FOLDER.glob("*.yaml"))}


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


def _checked(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise RnnzooError(f"{where} is a {type(raw).__name__}; expected a mapping.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(raw) - set(fields), key=str):
        raise RnnzooError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(fields)}.")
    for name, field in fields.items():
        if name not in raw:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise RnnzooError(f"{where} lacks the key {name!r}.")
            continue
        value, kind = raw[name], str(field.type).removesuffix(" | None")
        if value is None and kind != field.type:
            continue
        if kind == "float" and isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML reads 1e-4, without a point, as text
        if kind in ("float", "int") and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise RnnzooError(f"{where}: {name} is {value!r}; expected a finite number.")
            if kind == "int" and value != int(value):
                raise RnnzooError(f"{where}: {name} is {value!r}; expected a whole number.")
            raw[name] = float(value) if kind == "float" else int(value)
            continue
        expected = {"str": str, "bool": bool, "dict[str, Any]": dict}.get(kind, list)
        items = {"list[str]": str, "list[int]": int}.get(kind, object)
        wrong = isinstance(value, list) and not all(isinstance(item, items) for item in value)
        if wrong or not isinstance(value, expected):
            raise RnnzooError(f"{where}: {name} is {value!r}; expected {field.type}.")
    return cls(**raw)


def check_recipe(recipe: Recipe, where: str) -> None:
    """Refuses values that no conversion can work with.

    Raises:
        RnnzooError: begins with `where`.
    """
    from ...zoo.core.registry import ATTENTION_TYPES, known_mixers

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
    calibrates = any(isinstance(stage, Calibrate) and "windows" in stage.chosen(recipe) for stage in recipe.stages)
    if recipe.state_budget is not None and not calibrates:
        raise RnnzooError(f"{where}: a state budget is divided by a stage of kind calibrate, and there is none.")
    if recipe.calibration_tokens < 1 or recipe.batch_tokens < 1 or recipe.tokens < 0:
        raise RnnzooError(f"{where}: batch_tokens and calibration_tokens must be positive, and tokens not negative.")
