"""The parts of a plan that need weights and text: which layers matter, and where the state goes."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..kernels.errors import RnnzooError
from .context import StageContext
from .ranking import default_path, rank_layers, save_ranking
from .recipes import Recipe, kept_layers
from .run_folder import FOLDER
from .stages import Stage
from .student import layer_types
from .teachers import TeacherRef

__all__ = [
    "allocated_options",
    "allocation_of_run",
    "check_allocation",
    "measured_allocation",
    "measured_ranking",
    "temporary_context",
]


@contextlib.contextmanager
def temporary_context(teacher: TeacherRef, recipe: Recipe, **options: Any) -> Iterator[StageContext]:
    """Of a conversion that is not to be run, for what its first stages would measure."""
    with tempfile.TemporaryDirectory(prefix="rnnzoo-plan-") as folder:
        yield StageContext(Path(folder), teacher, recipe, **options)


def measured_ranking(context: StageContext, path: str | None) -> dict[str, Any]:
    """Ranks the layers and keeps the ranking in a file, whose path it adds; see `rank_layers`."""
    found = rank_layers(context)
    where = Path(path).expanduser() if path else default_path(context.teacher, context.recipe)
    save_ranking(where, found)
    return {"file": str(where)} | found


def check_allocation(recipe: Recipe) -> Stage:
    """The stage that divides the budget.

    Raises:
        RnnzooError: there is none, or no budget.
    """
    found = next((stage for stage in recipe.stages if stage.divides_budget(recipe)), None)
    if recipe.state_budget is None or found is None:
        raise RnnzooError(
            f"--allocate divides a state budget, but the recipe {recipe.name} with {recipe.student} layers has none; "
            "choose a recipe with a state_budget, such as rnnzoo."
        )
    return found


def measured_allocation(context: StageContext) -> dict[str, Any]:
    """Where the recipe's state budget goes, as its first calibration would have it."""
    teacher, recipe = context.teacher, context.recipe
    types = layer_types(teacher, recipe, kept_layers(recipe, teacher.config.num_hidden_layers))
    return check_allocation(recipe).divide_budget(context, types)


def allocated_options(allocation: dict[str, Any], layers: int) -> tuple[dict[str, Any], list[int]]:
    """Fields of the student's configuration, and the layers that the budget keeps as attention."""
    own = {entry["layer"]: entry for entry in allocation["layers"]}
    sizes = [own[i]["windows"] if i in own else [] for i in range(layers)]
    widths = [own[i]["feature_width"] if i in own else 0 for i in range(layers)]
    return {"window_sizes": sizes, "feature_widths": widths}, allocation.get("attention", [])


def allocation_of_run(folder: str) -> dict[str, Any]:
    """Where the state of a conversion that has been calibrated went: the last allocation in its run.json.

    Raises:
        RnnzooError: no run, or none that has divided a budget.
    """
    path = Path(folder) / FOLDER / "run.json"
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        found = [stage["allocation"] for stage in stages if "allocation" in stage]
    except OSError as error:
        raise RnnzooError(f"{folder} holds no conversion: {path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RnnzooError(f"{path} is damaged; convert again with --restart.") from error
    if not found:
        raise RnnzooError(f"The conversion in {folder} has not divided a state budget, at least not yet.")
    return found[-1]
