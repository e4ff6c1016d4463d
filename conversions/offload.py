"""`convert --offload`: one layer in memory at a time, so that the model may be many times as large as the memory.

    OUT/.rnnzoo/layers/<stage>/mixer-<i>.safetensors   the mixer of layer i after the stage
    OUT/.rnnzoo/layers/<stage>/hidden-<i>.bin          hidden states of the rows of `align` in front of layer i, mapped
    OUT/.rnnzoo/layers/<stage>/streams-<i>.safetensors those of the few rows of `calibrate`, in teacher and student

A stage takes the rows of text through the layers one after the other: it reads the teacher's layer from its mapped
files and the layer's mixer from the stage before, works on the mixer, writes it and the hidden states behind the layer,
and lets go of the layer. Killed, it goes on with the layer at which it was. The finished model is written a layer at a
time.

What can be done so are stages in which no layer learns for another: `calibrate` (but for windows, whose measure asks
for the loss's gradient) and `align` on the teacher's inputs, all layers in parallel. Results are those of the same
stages with the whole model in memory, but for one thing: in `align`, gradients are clipped layer by layer.

N rows of T tokens, D hidden_size.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from ..kernels.errors import RnnzooError
from ..zoo.core.registry import mixer_class
from .layerwise import Layers
from .prepare import keep_steps
from .recipes import Recipe, parse_keep
from .recipes.keep import needs_ranking
from .recipes.stages import Align, Calibrate, Stage
from .run import FINISHED

if TYPE_CHECKING:
    from .job import Job

__all__ = ["check_offload", "run_offloaded"]


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
        if why := _needs_all(stage, recipe):
            raise RnnzooError(
                f"With --offload one layer is in memory at a time, but the stage {stage.name} of the recipe "
                f"{recipe.name} {why}; use a recipe such as layerwise, or leave --offload out."
            )


def _needs_all(stage: Stage, recipe: Recipe) -> str | None:
    if isinstance(stage, Calibrate):
        if "windows" in stage.chosen(recipe):
            return "divides a state budget by the gradient of the loss"
        return "weights tokens by the gradient of the loss" if stage.weighting == "gradient" else None
    if not isinstance(stage, Align):
        return "needs the whole model"
    if stage.inputs != "teacher" or stage.order != "parallel":
        return "does not train all layers on the teacher's inputs (inputs: teacher, order: parallel)"
    return "has window dropout" if stage.window_dropout else None


def run_offloaded(job: Job) -> None:
    """All stages of the job's recipe, and the finished model."""
    layers = job.teacher.config.num_hidden_layers
    work = Layers(job, parse_keep(keep_steps(job.recipe, layers)[-1], layers))
    job.prepare_data()
    if job.run.record("initialise") is None:
        job.run.finish("initialise", None, work.initialise())
    previous, used = "initialise", 0
    for stage in job.recipe.stages:
        tokens = int(job.recipe.tokens * stage.share)
        rows = max(1, tokens // job.recipe.seq_len) if tokens else 0
        if isinstance(stage, Align) and not rows:
            continue
        if job.run.record(stage.name) is None:
            if isinstance(stage, Calibrate):
                report = work.calibrate(stage, previous)
            else:
                assert isinstance(stage, Align)
                data = job.packed("training", job.recipe.tokens).rows(used, rows)
                report = work.align(stage, previous, data)
            job.run.finish(stage.name, None, report)
            shutil.rmtree(work.folder / previous, ignore_errors=True)
        previous, used = stage.name, used + rows
    work.publish(previous)
    job.run.finish(FINISHED, None, {})
    shutil.rmtree(work.folder, ignore_errors=True)
