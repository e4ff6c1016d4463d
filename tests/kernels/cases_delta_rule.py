"""The delta rule, as the shared tests call it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rnnzoo.kernels.delta_rule import delta_rule

from .recurrences import Recurrence, Shape


def make(shape: Shape, variant: str) -> dict[str, torch.Tensor]:
    """A state that the rank-one term shrinks (a = -beta b, |b| = 1), or, in the grouped variant, any small a and b."""
    batch, time, heads, width = shape.batch, shape.time, shape.heads, shape.width
    values = width if variant == "no decay" else width // 2 + 1

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(batch, time, *sizes, dtype=torch.float64)

    keys, beta = F.normalize(normal(heads, width), dim=-1), torch.rand(batch, time, heads, 1, dtype=torch.float64)
    inputs = {"q": normal(heads, width), "k": beta * keys, "v": normal(heads, values), "a": -beta * keys, "b": keys}
    if variant == "per head":
        inputs["g"] = F.logsigmoid(normal(heads, 1) + 2)
    if variant == "per channel, grouped":
        inputs["q"] = normal(heads * 2, width)
        inputs["a"], inputs["b"] = (0.5 * F.normalize(normal(heads, width), dim=-1) for _ in range(2))
        inputs["g"] = -0.35 + F.logsigmoid(normal(heads, width) + 2)
    return inputs | {"initial_state": torch.randn(batch, heads, width, values, dtype=torch.float64)}


def decayed(inputs: dict[str, torch.Tensor], log: float) -> dict[str, torch.Tensor]:
    return inputs | {"g": torch.full_like(inputs["g"], log)}


TIMED = frozenset({"q", "k", "v", "a", "b"})
RECURRENCES = [
    Recurrence(
        "delta_rule",
        delta_rule,
        make,
        TIMED | {"g"},
        variants=("per head", "per channel, grouped"),
        decayed=decayed,
        small=(24, 1),
    ),
    Recurrence("delta_rule", delta_rule, make, TIMED, variants=("no decay",), small=(24, 1)),
]
