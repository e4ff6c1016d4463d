"""The parts of conversions: what may import what, and where a kind of stage may be asked for."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from .test_circles import imports, modules

ROOT = Path(__file__).resolve().parents[2] / "conversions"
PREFIX = "rnnzoo.conversions."
# StageRun -> the parts that it may not import, itself or by what it imports.
MAY_NOT = {
    "fit": {"context", "convert", "layers", "pipeline", "ranking", "run_folder", "stages"},
    "context": {"convert", "layers", "pipeline", "ranking", "stages"},
    "layers": {"convert", "pipeline", "ranking", "stages"},
    "stages": {"convert", "pipeline", "ranking", "recipes.load", "recipes.prepare"},
    "pipeline": {"convert", "plan"},
    "ranking": {"convert", "pipeline", "plan"},
}


@functools.cache
def graph() -> dict[str, set[str]]:
    return imports(modules())


def reached(part: str) -> set[str]:
    """Modules of conversions that those of a part import, and these in turn."""
    found = {module for module in graph() if f"{module}.".startswith(f"{PREFIX}{part}.")}
    assert found, part
    waiting = list(found)
    while waiting:
        new = graph()[waiting.pop()] - found
        found |= new
        waiting += new
    return {module.removeprefix(PREFIX) for module in found if module.startswith(PREFIX)}


@pytest.mark.parametrize("part", MAY_NOT)
def test_the_parts_import_one_way(part):
    """fit <- layers <- stages <- pipeline <- convert, and context <- stages."""
    found = {module for module in reached(part) if not f"{module}.".startswith(f"{part}.")}
    assert not {module for module in found for name in MAY_NOT[part] if f"{module}.".startswith(f"{name}.")}


def kinds() -> dict[str, str]:
    """Class of a kind -> the file that it is in."""
    from rnnzoo.conversions.stages import KINDS

    return {cls.__name__: f"{cls.__module__.rsplit('.', 1)[-1]}.py" for cls in KINDS.values()}


def test_a_kind_of_stage_is_one_file_with_settings_and_work():
    from rnnzoo.conversions.stages import KINDS

    for name, cls in KINDS.items():
        assert cls.kind == name and cls.__module__ == f"rnnzoo.conversions.stages.{name}"
        assert {"run", "check"} <= {attribute for base in cls.__mro__[:-1] for attribute in vars(base)}
        assert "run" in vars(cls), f"{name} has no work of its own"


def test_no_kind_of_stage_is_asked_for_outside_its_file():
    """Neither by its class nor by its name: what a stage is, it says by its interface."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                own = {name for name, where in kinds().items() if where == file.name}
                bases = {"Stage", "TrainedStage", "EndToEnd", "Distilled", "OwnData"}
                assert not asked & ((kinds().keys() | bases) - own), f"{file.relative_to(ROOT)}, line {node.lineno}"
        compared = re.search(r"\b(?:stage|self)\.kind (?:[!=]=|in|not in) ", file.read_text())
        assert compared is None or file.parent.name == "teachers", file.relative_to(ROOT)


def test_no_file_is_longer_than_400_lines():
    assert not {str(f.relative_to(ROOT)) for f in ROOT.rglob("*.py") if f.read_text().count("\n") > 400}
