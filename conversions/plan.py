"""`plan`: what a conversion would do and cost, from the teacher's config alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from ..zoo.core.registry import ATTENTION_TYPES
from ..zoo.core.sizes import parameter_count, state_bytes
from .devices import FLOPS_PER_CORE, parse_devices
from .prepare import prepare_recipe
from .recipes import keep_steps, kept_layers
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
) -> Plan:
    """Layer map, parameters, memory, state, tokens, time and licence; no weights are loaded.

    Time is 2 FLOP per parameter and token for each forward pass and 4 for a backward pass, at 50 GFLOP/s a core.

    Args:
        teacher: as `resolve_teacher` takes it; a folder with config.json alone will do.
        devices: such as "8xH100": adds what the conversion takes on these, by the formulas of `estimate.py`.
    Raises:
        RnnzooError: as `convert` would for the same input.
    """
    if devices is not None:
        parse_devices(devices)
    found = resolve_teacher(teacher, revision=revision, weights=False)
    own = {"student": student, "keep": keep, "state_budget": state_budget, "tokens": tokens, "seq_len": seq_len}
    chosen = prepare_recipe(recipe, found, **own, batch_tokens=batch_tokens)
    config = found.config
    kept = kept_layers(chosen, config.num_hidden_layers)
    types = layer_types(found, chosen, kept)
    built = student_config(found, chosen, types)
    state = chosen.state_budget or state_bytes(built, torch.bfloat16)
    kv_token = 2 * built.num_key_value_heads * built.head_dim * 2
    flops = 0.0
    stages = []
    for stage in chosen.stages:
        used = chosen.calibration_tokens if stage.kind == "calibrate" else int(chosen.tokens * stage.share)
        passes = 6 if stage.kind == "calibrate" else 8
        flops += passes * found.parameters * used
        stages.append({"stage": stage.name, "kind": stage.kind, "tokens": used, "trains": stage.trainable()})
    on_devices = {}
    if devices is not None:
        from .estimate import estimate

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
            "recipe": {"name": chosen.name, "student": chosen.student, "steps": keep_steps(chosen, len(types))},
            "kept_attention": kept,
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
            ],
        }
    )
