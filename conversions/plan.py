"""`plan`: what a conversion would do and cost, from the teacher's config alone."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.errors import RnnzooError
from ..zoo.core.registry import ATTENTION_TYPES
from ..zoo.core.sizes import parameter_count, state_bytes
from .context import Progress
from .devices import FLOPS_PER_CORE, parse_devices
from .estimate import estimate
from .measured_plan import (
    allocated_options,
    allocation_of_run,
    check_allocation,
    measured_allocation,
    measured_ranking,
    temporary_context,
)
from .recipes import keep_steps, kept_layers
from .recipes.keep import needs_ranking
from .recipes.prepare import prepare_recipe
from .student import layer_types, student_config
from .teachers import resolve_teacher

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What would happen; `to_dict` for showing."""

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.values


def make_plan(
    teacher: str | None,
    recipe: str,
    *,
    student: str | None = None,
    keep: str | None = None,
    state_budget: int | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_tokens: int | None = None,
    revision: str | None = None,
    devices: str | None = None,
    ranking: str | None = None,
    select: bool = False,
    allocate: bool = False,
    run: str | None = None,
    data: list[str] | None = None,
    chat_data: list[str] | None = None,
    text_field: str = "text",
    progress: Progress | None = None,
) -> Plan:
    """Layer map, parameters, memory, state, tokens, time and licence; no weights are loaded but for what is measured.

    Time is 2 FLOP per parameter and token for each forward pass and 4 for a backward pass, at 50 GFLOP/s a core.

    Args:
        teacher: as `resolve_teacher` takes it; a folder with config.json alone will do.
        devices: such as "8xH100": adds what the conversion takes on these, by the formulas of `estimate.py`.
        select: measure which layers matter, and write that to the file `ranking`, or to the cache; without `select`,
            `ranking` is read, for `keep` "best ...". allocate: measure where the state budget goes.
        run: folder of a calibrated conversion, whose allocation is shown. data, text_field: text to measure on.
        chat_data: of stages of kind sft and dpo, whose tokens are then counted, at 4 characters each.
    Raises:
        RnnzooError: as `convert` would for the same input.
    """
    if devices is not None:
        parse_devices(devices)
    measures = select or allocate
    found = resolve_teacher(teacher, revision=revision, weights=measures)
    own = {"student": student, "keep": keep, "state_budget": state_budget, "tokens": tokens, "seq_len": seq_len}
    own |= {"ranking": None if select else ranking}
    chosen = prepare_recipe(recipe, found, **own, batch_tokens=batch_tokens)
    if allocate:
        check_allocation(chosen)
        if needs_ranking(chosen.keep) and not chosen.ranking and not select:
            raise RnnzooError(f"keep {chosen.keep} takes layers from a ranking; give --select or --ranking as well.")
    measured: dict[str, Any] = {} if run is None else {"allocation": allocation_of_run(run)}
    if measures:
        with temporary_context(found, chosen, data=data, text_field=text_field, progress=progress) as context:
            if select:
                measured["ranking"] = measured_ranking(context, ranking)
                if needs_ranking(chosen.keep):
                    chosen = context.recipe = dataclasses.replace(chosen, ranking=measured["ranking"]["order"])
            if allocate:
                measured["allocation"] = measured_allocation(context)
    config = found.config
    kept = kept_layers(chosen, config.num_hidden_layers)
    decided = bool(chosen.ranking) or not needs_ranking(chosen.keep)
    steps = keep_steps(chosen, config.num_hidden_layers) if decided else [chosen.keep]
    options = {}
    if "allocation" in measured:
        options, more = allocated_options(measured["allocation"], config.num_hidden_layers)
        kept = sorted({*kept, *more})
    types = layer_types(found, chosen, kept)
    if options and [bool(sizes) for sizes in options["window_sizes"]] != [kind == chosen.student for kind in types]:
        raise RnnzooError(
            f"The conversion in {run} has converted other layers than this plan; give its teacher and --keep."
        )
    built = student_config(found, chosen, types, **options)
    state = chosen.state_budget or state_bytes(built, torch.bfloat16)
    kv_token = 2 * built.num_key_value_heads * built.head_dim * 2
    flops = 0.0
    stages = []
    for stage in chosen.stages:
        used = stage.tokens_read(chosen, chat_data)
        flops += (8 if stage.together else 6) * found.parameters * (used or 0)
        stages.append({"stage": stage.name, "kind": stage.kind, "tokens": used, "trains": stage.trainable()})
    on_devices = {}
    if devices is not None:
        on_devices = {"devices": estimate(devices, found, chosen, built)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Plan(
        {
            "teacher": {
                "name": found.name,
                "family": found.family.model_type,
                "licence": found.licence or "not stated",
            },
            "parameters": found.parameters,
            "student_parameters": parameter_count(built),
            "recipe": {"name": chosen.name, "student": chosen.student, "steps": steps},
            "kept_attention": kept if decided else None,
            "state_bytes": state,
            "kept_attention_bytes_per_1k_tokens": 1024 * kv_token * len(kept),
            "teacher_kv_bytes": {f"at_{n // 1024}k": n * kv_token * len(types) for n in (2048, 32768, 131072)},
            "training": {"tokens": chosen.tokens, "seq_len": chosen.seq_len},
            "memory_bytes": 22 * found.parameters + 2 * chosen.seq_len * built.hidden_size * len(types) * 60,
            "time_seconds": flops / (FLOPS_PER_CORE * cores),
            **on_devices,
            "stages": stages,
            "layers": [
                {"layer": i, "mixer": kind, "state": "grows with the text" if kind in ATTENTION_TYPES else "constant"}
                for i, kind in enumerate(types)
            ]
            if decided
            else [],
            **measured,
        }
    )
