"""The recipe's state budget becomes a configuration: errors are measured, then bytes go where they remove most."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.errors import RnnzooError
from ...zoo.core.registry import ATTENTION_TYPES
from ...zoo.core.sizes import layer_state_bytes, state_bytes
from ..budget import state_costs
from ..student import student_config
from .allocation import Allocation, allocate
from .state_errors import Measured, measure_states

if TYPE_CHECKING:
    from ...zoo.core.configuration import RecurrentConfig
    from ...zoo.core.heads import RecurrentForCausalLM
    from ..data import PackedTokens
    from ..recipes import Recipe
    from ..teachers import TeacherRef

__all__ = ["allocated_config", "feature_widths", "reallocated_config", "spend_budget"]


def spend_budget(
    teacher: TeacherRef,
    twin: RecurrentForCausalLM,
    recipe: Recipe,
    stage: Any,
    types: list[str],
    data: PackedTokens,
    dtype: torch.dtype,
    seed: int,
    fixed_widths: Mapping[int, int] | None = None,
    trained: Collection[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[RecurrentConfig, dict[str, Any]]:
    """The student's configuration with what `recipe.state_budget` buys, and a record of it.

    Args:
        twin: the teacher, every layer attention. types: mixer of each layer. dtype: of the model that will be saved.
        fixed_widths: feature widths of layers that must keep theirs. trained: layers that cannot be attention again.
    Raises:
        RnnzooError: the budget is too small.
    """
    sinks = student_config(teacher, recipe, types).num_sinks
    measured = measure_states(
        twin, data, sinks, seed, [*stage.feature_widths, *(fixed_widths or {}).values()], progress
    )
    return allocated_config(teacher, recipe, stage, types, measured, dtype, fixed_widths, trained)


def allocated_config(
    teacher: TeacherRef,
    recipe: Recipe,
    stage: Any,
    types: list[str],
    measured: Measured,
    dtype: torch.dtype,
    fixed_widths: Mapping[int, int] | None = None,
    trained: Collection[int] = (),
) -> tuple[RecurrentConfig, dict[str, Any]]:
    """The same from errors that have been measured."""
    chooses = bool(stage.feature_widths)
    costs = state_costs(teacher, recipe, types, dtype, chooses, stage.budget_context)
    converted = [i for i, kind in enumerate(types) if kind not in ATTENTION_TYPES]
    own = teacher.family.attention_types(teacher.config)
    may_keep = [i for i in converted if own[i] == "full_attention" and i not in trained]
    assert recipe.state_budget is not None
    found = allocate(measured, converted, recipe.state_budget, costs, fixed_widths if chooses else None, may_keep)
    types = [own[i] if i in found.attention else kind for i, kind in enumerate(types)]
    options: dict[str, Any] = {"window_sizes": found.window_sizes}
    if chooses:
        options["feature_widths"] = found.feature_widths
    config = student_config(teacher, recipe, types, **options)
    if state_bytes(config, dtype) != found.state_bytes:
        raise RnnzooError(
            f"The state was planned with {found.state_bytes:,} bytes, but has {state_bytes(config, dtype):,}; please "
            "report this with the recipe and the teacher."
        )
    return config, _record(config, found, costs.attention, dtype)


def _record(config: RecurrentConfig, found: Allocation, attention: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """What results.json and `plan` tell of an allocation."""
    record = {
        "state_bytes": found.state_bytes,
        "error": found.error,
        "layers": [
            {"layer": i, "windows": found.window_sizes[i], "feature_width": width, "bytes": size}
            for i, (width, size) in enumerate(
                zip(feature_widths(config), layer_state_bytes(config, dtype), strict=True)
            )
            if found.window_sizes[i]
        ],
    }
    if attention is not None:
        record |= {"attention": found.attention, "attention_bytes": found.attention_bytes}
    return record


def reallocated_config(
    teacher: TeacherRef, recipe: Recipe, config: RecurrentConfig, measured: Measured, dtype: torch.dtype
) -> tuple[RecurrentConfig, dict[str, Any]]:
    """The configuration of a student with other windows in as many bytes, and a record of it.

    Args:
        config: of the student; its feature widths stay. measured: errors of windows beside them.
    """
    types, widths, own = config.layer_types, feature_widths(config), config.window_sizes
    converted = [i for i, kind in enumerate(types) if kind not in ATTENTION_TYPES]
    fixed = {i: widths[i] for i in converted}
    every = tuple(sorted(set(fixed.values())))
    errors = measured.errors.expand(-1, -1, len(every), -1)
    costs = state_costs(teacher, recipe, types, dtype, chooses_widths=True)
    found = allocate(
        Measured(errors, measured.windows, every), converted, state_bytes(config, dtype), costs, fixed_widths=fixed
    )
    before = sum(
        float(measured.errors[i, head, 0, measured.windows.index(own[i][head])])
        for i in converted
        for head in range(errors.shape[1])
    )
    moved = sum(abs(a - b) for i in converted for a, b in zip(own[i], found.window_sizes[i], strict=True)) // 2
    changed = student_config(teacher, recipe, types, window_sizes=found.window_sizes, feature_widths=widths)
    record = _record(changed, found, None, dtype)
    return changed, record | {"error_before": before, "tokens_moved": moved}


def feature_widths(config: RecurrentConfig) -> list[int]:
    """Of every layer."""
    return config.feature_widths or [config.feature_width] * config.num_hidden_layers
