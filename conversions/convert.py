"""`convert`: a Transformer goes in, a folder that AutoModelForCausalLM loads comes out."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from ..cards import render_card
from ..kernels.errors import RnnzooError
from .context import Progress, StageContext
from .data import open_corpus
from .energy import check_energy, measured_energy
from .pipeline import Pipeline
from .processes import Processes
from .recipes import Recipe
from .recipes.prepare import check_inputs, check_offload, check_processes, prepare_recipe
from .results import evaluated_results, write_results
from .run_folder import FINISHED, Run, alone_in, holds_run, join_run, open_run
from .teachers import TeacherRef, resolve_teacher
from .teachers.files import user_errors

__all__ = ["convert"]


def convert(
    teacher: str | None,
    recipe: str,
    out: str | Path,
    *,
    data: list[str] | None = None,
    text_field: str = "text",
    student: str | None = None,
    keep: str | None = None,
    state_budget: int | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_tokens: int | None = None,
    ranking: str | None = None,
    chat_data: list[str] | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    restart: bool = False,
    evaluate: bool = True,
    revision: str | None = None,
    offload: bool = False,
    activation_checkpointing: bool = False,
    energy: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs all stages of a recipe; the same call goes on where a stopped one was, and ends at the same weights.

    Under torchrun or `accelerate launch` every process calls it: a step has the same rows as with one process, and a
    run may go on with another number of processes than it began with.

    Args:
        teacher: as `resolve_teacher` takes it. recipe: a name or the path of a YAML file.
        data: as `open_corpus` takes it; None: the embedded default.
        student, keep, state_budget, tokens, seq_len, batch_tokens: instead of the recipe's own.
        ranking: file of `plan --select`, for `keep` "best ..."; None: the layers are ranked before the first stage.
        chat_data: chats and preferences, as `data/chats.py` describes them, for stages of kind sft and dpo.
        dtype: "bfloat16" or "float32", of the saved weights, and of training where bfloat16 is fast (`compute_dtype`).
        restart: discard an earlier run in `out`.
        evaluate: measure the result on text held out from the data, beside the teacher, and the way there.
        offload: keep teacher and student on disk, with one layer in memory at a time: for stages that work layer by
            layer, see `mapped_layers.py`. The result is not measured, because that takes the whole model.
        activation_checkpointing: in stages that train, keep of a block's activations its input alone and make the
            others again for the gradient: less memory, a third more work, the same result.
        energy: ISO code of the country, such as "DEU": measure energy and CO2 of the stages with CodeCarbon.
        progress: called as progress(stage, done tokens, all tokens, info).
    Returns:
        The contents of results.json; of several processes, the main one has them.
    Raises:
        RnnzooError: bad input, as one sentence.
    """
    if dtype not in ("bfloat16", "float32"):
        raise RnnzooError(f"dtype is {dtype!r}; expected bfloat16 or float32.")
    check_energy(energy)
    processes = Processes()
    main = processes.main
    own = {"student": student, "keep": keep, "state_budget": state_budget, "tokens": tokens, "seq_len": seq_len}
    own |= {"batch_tokens": batch_tokens, "ranking": ranking}

    def checked() -> tuple[TeacherRef, Recipe, dict[str, Any]]:
        found = resolve_teacher(teacher, revision=revision)
        chosen = prepare_recipe(recipe, found, **own, dtype=getattr(torch, dtype))
        check_processes(chosen, found, processes.count)
        if offload:
            check_offload(chosen, data, processes.count)
        fresh = main and (restart or not holds_run(out))
        if data and fresh:
            # Unusable data must be told before an earlier run is discarded.
            next(open_corpus(data, text_field).documents("training"), None)
        return found, chosen, check_inputs(chosen, found, chat_data, look=fresh)

    found, chosen, inputs = processes.first(checked)
    request = {
        "teacher": found.sha,
        "recipe": chosen.to_dict(),
        "data": data,
        "text_field": text_field,
        "seed": seed,
        "dtype": dtype,
        "offload": offload,
        **inputs,
    }
    with contextlib.ExitStack() as stack:

        def opened() -> Run:
            if not main:
                return join_run(out)
            stack.enter_context(alone_in(out))
            run = open_run(out, request, restart)
            if run.created:
                stack.enter_context(alone_in(out))
            return run

        run = processes.first(opened)
        context = StageContext(
            run.folder,
            found,
            chosen,
            data=data,
            text_field=text_field,
            chat_data=chat_data,
            seed=seed,
            dtype=getattr(torch, dtype),
            checkpointing=activation_checkpointing,
            progress=progress if main else None,
        )
        measured = evaluate and not offload
        pipeline = Pipeline(run, context, offload=offload, ladder=measured)

        def results() -> dict[str, Any]:
            value = evaluated_results(run, context) if measured else write_results(run, context)
            render_card(run.out)
            return value

        try:
            with user_errors(f"The conversion into {out} stopped, and the same command will go on with it"):
                if run.record(FINISHED) is None:
                    with measured_energy(energy if main else None, run.folder):
                        pipeline.complete()
                return processes.only(results) or {}
        except RnnzooError:
            if main:
                run.discard()
            raise
