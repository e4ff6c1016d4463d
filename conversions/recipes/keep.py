"""Which layers stay attention: from the words of `keep` to numbers of layers, at the end and at each step.

And, of a recipe that converts step by step, which stages run at a step, on how many tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...kernels.errors import RnnzooError
from .recipe import Recipe

__all__ = [
    "check_ranking",
    "keep_steps",
    "kept_layers",
    "needs_ranking",
    "parse_keep",
    "stage_steps",
    "stage_tokens",
    "written",
]

EXPECTED = (
    "neither none, a share such as 1/4, nor layer numbers such as 0,8,16, nor first, last or best with a number or a "
    "share, such as best 25%"
)


def parse_keep(keep: str, layers: int, ranking: Sequence[int] | None = None) -> list[int]:
    """Which of `layers` layers stay attention.

    Args:
        keep: "none"; "1/n" or "uniform 1/n" (layers n-1, 2n-1, ...); "0,8,16"; "first 4", "last 4" or "best 4", which
            also take a share, as "best 25%" or "best 1/4". Shares are rounded, to one layer at least.
        ranking: all layers, the most important first, for "best".
    Raises:
        RnnzooError: none of these, a number out of range, or a "best" without a ranking.
    """
    text = " ".join(str(keep).lower().split())
    if text in ("none", ""):
        return []
    word, _, amount = text.partition(" ")
    if word == "uniform" and re.fullmatch(r"1/\d+", amount):
        text = amount
    if match := re.fullmatch(r"1/(\d+)", text):
        period = int(match.group(1))
        if period < 1 or period > layers:
            raise RnnzooError(f"keep {keep}: a share must lie between 1/{layers} and 1/1 for {layers} layers.")
        return list(range(period - 1, layers, period))
    if word in ("first", "last", "best") and amount:
        count = _count(keep, amount, layers)
        if word == "best" and not ranking:
            raise RnnzooError(
                f"keep {keep} takes layers from a ranking, and there is none; `rnnzoo plan --select` makes one."
            )
        order = {"first": range(layers), "last": range(layers)[::-1], "best": ranking}[word]
        return sorted((order or [])[:count])
    if not re.fullmatch(r"\d+( ?, ?\d+)*", text):
        raise RnnzooError(f"keep {keep!r} is {EXPECTED}.")
    numbers = sorted({int(number) for number in text.split(",")})
    if numbers[-1] >= layers:
        raise RnnzooError(f"keep {keep}: there is no layer {numbers[-1]}; the teacher's layers are 0 to {layers - 1}.")
    return numbers


def _count(keep: str, amount: str, layers: int) -> int:
    """How many layers "8", "25%" or "1/4" are."""
    if re.fullmatch(r"\d+", amount):
        count = int(amount)
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)%|1/([1-9]\d*)", amount):
        share = float(match.group(1)) / 100 if match.group(1) else 1 / int(match.group(2))
        count = max(1, round(share * layers)) if share else 0
    else:
        raise RnnzooError(f"keep {keep!r} is {EXPECTED}.")
    if count > layers:
        raise RnnzooError(f"keep {keep}: the teacher has {layers} layers.")
    return count


def needs_ranking(keep: str) -> bool:
    """Whether `keep` takes its layers from a ranking."""
    return str(keep).strip().lower().startswith("best")


def check_ranking(ranking: Sequence[int], layers: int, where: str) -> None:
    """Refuses what is not every layer once.

    Raises:
        RnnzooError: begins with `where`.
    """
    if sorted(ranking) != list(range(layers)):
        raise RnnzooError(
            f"{where} ranks the layers {', '.join(map(str, ranking))}; expected each of 0 to {layers - 1} once."
        )


def kept_layers(recipe: Recipe, layers: int) -> list[int]:
    """The layers that a recipe keeps in the end. Before a ranking is made, "best" stands for as many first layers."""
    return parse_keep(recipe.keep, layers, recipe.ranking or range(layers))


def keep_steps(recipe: Recipe, layers: int) -> list[str]:
    """What stays attention at each step: progressively less, one layer less a step, or the end at once.

    Progressively, a quarter of the layers is converted first. Step by step, the layers 0, 2, 4 ... come before the
    others. Both orders are those of The Mamba in the Llama; with a ranking, the least important come first instead.
    """
    target, ranked = set(kept_layers(recipe, layers)), needs_ranking(recipe.keep)
    end = written(sorted(target)) if ranked else recipe.keep
    order = list(recipe.ranking or range(layers))
    if recipe.stepwise:
        converted = sorted(set(range(layers)) - target, key=lambda layer: (layer % 2, layer))
        if ranked:
            converted = [layer for layer in reversed(order) if layer not in target]
        kept = [sorted(set(range(layers)) - set(converted[: number + 1])) for number in range(len(converted) - 1)]
        return [written(numbers) for numbers in kept] + [end]
    if not recipe.progressive:
        return [end]
    if ranked:
        counts = [layers - layers // 4, *(layers // n for n in (2, 4, 8))]
        return [written(sorted(order[:count])) for count in dict.fromkeys(counts) if count > len(target)] + [end]
    shares = [written([layer for layer in range(layers) if layer % 4])] if layers >= 4 else []
    shares += [f"1/{n}" for n in (2, 4, 8) if n <= layers]
    return [share for share in shares if set(parse_keep(share, layers)) > target] + [end]


def written(layers: Sequence[int]) -> str:
    """Numbers of layers as `parse_keep` reads them."""
    return ",".join(map(str, layers)) or "none"


def stage_steps(recipe: Recipe, stage: Any, layers: int) -> list[bool]:
    """Of which of the `keep_steps` a stage is part."""
    kept = [len(parse_keep(keep, layers)) for keep in keep_steps(recipe, layers)]
    last, half = len(kept) - 1, layers // 2
    return [
        {
            "each": True,
            "last": number == last,
            "up to half": left >= half or number == 0,
            "from half": left <= half or number == last,
        }[stage.steps]
        for number, left in enumerate(kept)
    ]


def stage_tokens(recipe: Recipe, stage: Any, layers: int) -> list[int]:
    """Training tokens of a stage at each of the `keep_steps`: its share in equal parts, 0 where it has no part."""
    part = stage_steps(recipe, stage, layers)
    return [int(recipe.tokens * stage.share / sum(part)) if chosen else 0 for chosen in part]
