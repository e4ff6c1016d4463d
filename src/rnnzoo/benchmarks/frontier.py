"""Quality against bytes of state: ours at many budgets, other recipes at theirs, and caches that are merely bounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cards.style import GREY, LIGHT, MIXERS

__all__ = ["draw", "frontier_rows", "frontier_table"]

PANELS = (
    ("perplexity at 2,048 tokens", "ppl_2048"),
    ("perplexity at 8,192 tokens", "ppl_8192"),
    ("recall 512 tokens back", "recall_512"),
    ("recall 2,048 tokens back", "recall_2048"),
)
CONTEXT = 8192  # at which the bytes of kept attention are counted
COLOURS = {"rnnzoo": LIGHT.blue, "window + sinks": LIGHT.red, "tova": MIXERS[2]}


def frontier_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """[{series, bytes, <panel>: value}] by series and bytes; the third column of each of ours is a point too."""
    found = []
    for row in rows:
        state = row["state_bytes"] + CONTEXT * row["bytes_per_token"]
        series = row["run"].split("-")[0] if row["run"].startswith(("tova", "rnnzoo")) else row["run"]
        found.append({"series": series, "bytes": state} | {key: row.get(f"{key}_student") for _, key in PANELS})
        if f"{PANELS[0][1]}_window" in row:
            window = {key: row.get(f"{key}_window") for _, key in PANELS}
            found.append({"series": "window + sinks", "bytes": state} | window)
    return sorted(found, key=lambda row: (row["series"], row["bytes"]))


def frontier_table(rows: Sequence[dict[str, Any]], teacher: dict[str, Any]) -> str:
    """Markdown, the teacher last."""
    lines = [f"| | state MB | {' | '.join(title for title, _ in PANELS)} |", "|" + "---|" * (2 + len(PANELS))]
    for row in [*rows, {"series": "teacher, whole cache", "bytes": None} | teacher]:
        state = "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"
        values = ["-" if row.get(key) is None else f"{row[key]:.2f}" for _, key in PANELS]
        lines.append(f"| {row['series']} | {state} | {' | '.join(values)} |")
    return "\n".join([*lines, ""])


def draw(rows: Sequence[dict[str, Any]], teacher: dict[str, Any], path: Path) -> None:
    """The panels as a picture; bytes on a logarithmic axis.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.6), layout="constrained")
    names = list(dict.fromkeys(row["series"] for row in rows))
    others = pyplot.get_cmap("Dark2")
    for axis, (title, key) in zip(axes, PANELS, strict=True):
        for number, name in enumerate(names):
            points = [(r["bytes"] / 1e6, r[key]) for r in rows if r["series"] == name and r.get(key) is not None]
            if points:
                colour = COLOURS.get(name, others(number % 8))
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4)
        if teacher.get(key) is not None:
            axis.axhline(teacher[key], color=GREY, linestyle=":", label="teacher")
        axis.set(xscale="log", xlabel="state, MB", title=title)
        if key.startswith("ppl"):
            axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
