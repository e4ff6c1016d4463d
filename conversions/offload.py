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

from .context import StageContext
from .layerwise import Layers
from .recipes import keep_steps, parse_keep
from .run_folder import FINISHED, Run
from .stages.align import Align
from .stages.calibrate import Calibrate

__all__ = ["run_offloaded"]


def run_offloaded(run: Run, context: StageContext) -> None:
    """All stages of the recipe, and the finished model."""
    layers = context.teacher.config.num_hidden_layers
    work = Layers(run, context, parse_keep(keep_steps(context.recipe, layers)[-1], layers))
    for stage in context.recipe.stages:
        stage.prepare(context)
    if run.record("initialise") is None:
        run.finish("initialise", None, work.initialise())
    previous, used = "initialise", 0
    for stage in context.recipe.stages:
        tokens = int(context.recipe.tokens * stage.share)
        rows = max(1, tokens // context.recipe.seq_len) if tokens else 0
        if isinstance(stage, Align) and not rows:
            continue
        if run.record(stage.name) is None:
            if isinstance(stage, Calibrate):
                report = work.calibrate(stage, previous)
            else:
                assert isinstance(stage, Align)
                data = context.training().rows(used, rows)
                report = work.align(stage, previous, data)
            run.finish(stage.name, None, report)
            shutil.rmtree(work.folder / previous, ignore_errors=True)
        previous, used = stage.name, used + rows
    work.publish(previous)
    run.finish(FINISHED, None, {})
    shutil.rmtree(work.folder, ignore_errors=True)
