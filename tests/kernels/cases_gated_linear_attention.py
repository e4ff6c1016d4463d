"""Gated linear attention without a window, as the shared tests call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnzoo.kernels.gated_linear_attention import gated_linear_attention

from .recurrences import Recurrence, Shape

GROUPED = {"per head", "bonus"}  # variants whose query heads share key/value heads, three each


def make(shape: Shape, variant: str) -> dict[str, Tensor]:
    batch, time, heads, width = shape.batch, shape.time, shape.heads, shape.width
    kv_heads = heads // 3 if variant in GROUPED and heads % 3 == 0 else heads

    def random(*sizes: int) -> Tensor:
        x = torch.randn(*sizes, dtype=torch.float64)
        return x.exp() if variant == "normalized" else x  # weights that are all positive

    inputs = {
        "q": random(batch, time, heads, width),
        "k": random(batch, time, kv_heads, width),
        "v": torch.randn(batch, time, kv_heads, width, dtype=torch.float64),
    }
    decay = {
        "per head": (batch, time, kv_heads, 1),
        "per channel": (batch, time, kv_heads, width),
        "bonus": (batch, time, kv_heads, width),
        "constant": (kv_heads,),
        "normalized": (kv_heads,),
    }
    inputs["g"] = -torch.rand(decay[variant], dtype=torch.float64)
    if variant == "bonus":
        inputs["bonus"] = torch.randn(heads, width, dtype=torch.float64)
    columns = width + (variant == "normalized")
    state = torch.randn(batch, kv_heads, width, columns, dtype=torch.float64)
    return inputs | {"initial_state": state.abs() if variant == "normalized" else state}


def decayed(inputs: dict[str, Tensor], log: float) -> dict[str, Tensor]:
    return inputs | {"g": torch.full_like(inputs["g"], log)}


def spread(inputs: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The constant decay of each head, written for every step and channel."""
    return inputs | {"g": inputs["g"][:, None].expand(shape.batch, shape.time, -1, shape.width)}


def normalized(*, initial_state: Tensor | None = None, **call: Any) -> tuple[Tensor, Tensor]:
    """With the plain output added: where one step has all the weight the other is v, and q's gradient mere rounding.

    Both take the decay in float32: its gradient, one number a head, is rounded after the two have been added.
    """
    call["g"] = call["g"].to(torch.promote_types(call["g"].dtype, torch.float32))
    o, state = gated_linear_attention(**call, initial_state=initial_state, normalize=True)
    start = None if initial_state is None else initial_state[..., :-1]
    plain, _ = gated_linear_attention(**call, initial_state=start, scale=0.1)
    return o + plain, state


def describe(
    variants: tuple[str, ...], timed: set[str], function: Any = gated_linear_attention, **more: Any
) -> Recurrence:
    return Recurrence(
        "gated_linear_attention",
        function,
        make,
        frozenset({"q", "k", "v"} | timed),
        variants=variants,
        decayed=decayed,
        **more,
    )


RECURRENCES = [
    describe(("per head", "per channel", "bonus"), {"g"}),
    describe(("constant",), set(), spread=spread),
    describe(("normalized",), set(), normalized, spread=spread),
]
