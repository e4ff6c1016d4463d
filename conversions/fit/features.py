"""The start in closed form of what sums beside a window, from what the teacher's attention does on one sequence."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from .observe import observe, sample_rows

if TYPE_CHECKING:
    from ...zoo.core.heads import RecurrentForCausalLM
    from ..data import PackedTokens

__all__ = ["fit_features"]


def fit_features(
    student: RecurrentForCausalLM,
    twin: RecurrentForCausalLM,
    data: PackedTokens,
    seed: int,
    only: Container[int] | None = None,
) -> None:
    """`Mixer.fit_features` of the student's layers (those in `only`; None: all), in place, on the first sequence."""
    ids = data[0]["input_ids"]
    ctx, rows = twin.model.make_context(1, len(ids), ids.device), sample_rows(len(ids), seed)
    for number, (block, seen) in enumerate(zip(student.model.layers, observe(twin, ids, False, seed), strict=True)):
        if only is None or number in only:
            block.mixer.fit_features(seen.q, seen.k, ctx, rows, seed)
