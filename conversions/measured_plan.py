"""The parts of a plan that need weights and text: which layers matter, and where the state goes."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.errors import RnnzooError
from .recipes import kept_layers
from .recipes.stages import Measuring
from .run import Run
from .selection import default_path, rank_layers, save_ranking
from .student import layer_types

if TYPE_CHECKING:
    from .job import Job, Progress
    from .recipes import Recipe
    from .teachers import TeacherRef

__all__ = [
    "allocated_options",
    "allocation_of_run",
    "check_allocation",
    "measured_allocation",
    "measured_ranking",
    "temporary_job",
]


@contextlib.contextmanager
def temporary_job(
    teacher: TeacherRef, recipe: Recipe, data: list[str] | None, text_field: str, progress: Progress | None
) -> Iterator[Job]:
    """A conversion that is not to be run, for what its first stages would measure."""
    from .job import Job

    with tempfile.TemporaryDirectory(prefix="rnnzoo-plan-") as folder:
        run = Run(Path(folder), {}, [])
        run.folder.mkdir()
        yield Job(run, teacher, recipe, data, text_field, 0, torch.bfloat16, progress or (lambda *_: None))


def measured_ranking(job: Job, path: str | None) -> dict[str, Any]:
    """Ranks the layers and keeps the ranking in a file, whose path it adds; see `rank_layers`."""
    found = rank_layers(job)
    where = Path(path).expanduser() if path else default_path(job.teacher, job.recipe)
    save_ranking(where, found)
    return {"file": str(where)} | found


def check_allocation(recipe: Recipe) -> Measuring:
    """The stage that divides the budget.

    Raises:
        RnnzooError: there is none, or no budget.
    """
    stages = [stage for stage in recipe.stages if isinstance(stage, Measuring)]
    if recipe.state_budget is None or not stages:
        raise RnnzooError(
            f"--allocate divides a state budget, but the recipe {recipe.name} with {recipe.student} layers has none; "
            "choose a recipe with a state_budget, such as rnnzoo."
        )
    return stages[0]


def measured_allocation(job: Job) -> dict[str, Any]:
    """Where the recipe's state budget goes, as its first calibration would have it."""
    from .fit.spend import spend_budget

    recipe = job.recipe
    types = layer_types(job.teacher, recipe, kept_layers(recipe, job.teacher.config.num_hidden_layers))
    data = job.packed("calibration", recipe.calibration_tokens)
    report = lambda done, total: job.progress("allocate", done, total, {})  # noqa: E731
    stage = check_allocation(recipe)
    _, record = spend_budget(job.teacher, job.twin, recipe, stage, types, data, job.dtype, job.seed, progress=report)
    return record


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
    path = Run(Path(folder), {}, []).folder / "run.json"
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
