"""What windows, linear states and kept attention cost in bytes, read off the states themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..kernels.errors import RnnzooError
from ..zoo.core.registry import ATTENTION_TYPES
from ..zoo.core.sizes import state_bytes
from .student import student_config

if TYPE_CHECKING:
    from .recipes import Recipe
    from .teachers import TeacherRef

__all__ = ["Costs", "check_budget", "state_costs"]


@dataclass(frozen=True)
class Costs:
    """Bytes of each thing.

    Attributes:
        layer: of a converted layer before any window: sinks, the count, and a linear state that is not to be chosen.
        token: of a window, per kv head. feature: of a linear state, per kv head and unit of width.
        attention: of a kept layer's keys and values at the context that the recipe names; None: not a candidate.
    """

    layer: int
    token: int
    feature: int
    attention: int | None = None


def state_costs(
    teacher: TeacherRef, recipe: Recipe, types: list[str], dtype: torch.dtype, chooses_widths: bool, context: int = 0
) -> Costs:
    """The costs of a student with mixers `types` in a model of `dtype`.

    Args:
        chooses_widths: else the recipe's own feature width is part of every layer's cost.
        context: tokens for which a kept attention layer is paid; 0: it is not a candidate.
    """
    fields = teacher.family.student_config(teacher.config)
    kv_heads, count = fields["num_key_value_heads"], sum(kind not in ATTENTION_TYPES for kind in types)

    def size(window: int, width: int) -> int:
        own = {"window_sizes": [[window] * kv_heads] * len(types)}
        own |= {"feature_widths": [width] * len(types)} if chooses_widths else {}
        return state_bytes(student_config(teacher, recipe, types, **own), dtype) // count

    least = size(1, 0)
    token, feature = (size(2, 0) - least) // kv_heads, (size(1, 2) - least) // kv_heads // 2
    attention = context * 2 * kv_heads * fields["head_dim"] * dtype.itemsize if context else None
    return Costs(least - token * kv_heads, token, feature, attention)


def check_budget(
    teacher: TeacherRef, recipe: Recipe, types: list[str], dtype: torch.dtype, chooses_widths: bool
) -> None:
    """Refuses a state budget that does not buy a window of one token for every kv head.

    Args:
        chooses_widths: of the linear states as well, so that these may be left out.
    Raises:
        RnnzooError: with the least that does.
    """
    costs = state_costs(teacher, recipe, types, dtype, chooses_widths)
    kv_heads = teacher.family.student_config(teacher.config)["num_key_value_heads"]
    least = sum(kind not in ATTENTION_TYPES for kind in types) * (costs.layer + kv_heads * costs.token)
    if recipe.state_budget is not None and recipe.state_budget < least:
        raise RnnzooError(
            f"A state budget of {recipe.state_budget:,} bytes is too small: with windows of one token, the recipe "
            f"{recipe.name} takes {least:,} for this teacher."
        )
