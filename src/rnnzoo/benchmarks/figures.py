"""What a benchmark script promises: values against bounds, as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..kernels.files import replace_text

__all__ = ["Figure", "median_of_rounds", "report"]


@dataclass(frozen=True)
class Figure:
    """One line of the table: `value` must be `target` at least, or with `at_most` no more; without a target it is told.

    Args:
        what: was measured. against: what it is compared with. unit: of value and target, with its space.
        least, most: of the rounds that `value` is the median of; None: it was measured once.
    """

    what: str
    against: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = False
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        if self.target is None:
            return True
        return self.value <= self.target if self.at_most else self.value >= self.target

    def line(self) -> str:
        """A row of a Markdown table."""
        bound, met = "", ""
        if self.target is not None:
            bound = f"{'at most' if self.at_most else 'at least'} {self.target:g}{self.unit}"
            met = "yes" if self.met else "no"
        spread = "" if self.least is None else f" ({self.least:.3g} to {self.most:.3g})"
        return f"| {self.what} | {self.against} | {self.value:.3g}{self.unit}{spread} | {bound} | {met} |"


def median_of_rounds(rounds: Sequence[Sequence[Figure]]) -> list[Figure]:
    """Each figure's median over rounds that measured the same ones in the same order, with the least and the most."""
    if len(rounds) == 1:
        return list(rounds[0])
    figures = []
    for same in zip(*rounds, strict=True):
        values = [figure.value for figure in same]
        figures.append(replace(same[0], value=statistics.median(values), least=min(values), most=max(values)))
    return figures


def report(figures: list[Figure], heading: str, out: Path | None, **facts: Any) -> str:
    """The table as text; with `out` also OUT/figures.md and OUT/figures.json, the latter with `facts`."""
    head = ["| what | against | measured | figure | met |", "|---|---|---|---|---|"]
    text = "\n".join([heading, "", *head, *(figure.line() for figure in figures), ""])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / "figures.md", text)
        values = [asdict(figure) | {"met": figure.met} for figure in figures]
        replace_text(out / "figures.json", json.dumps({**facts, "figures": values}, indent=1))
    return text
