"""The README's plot: quality, speed and memory of the default conversion, from the tables of docs/results.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rnnzoo.cards.style import Theme

__all__ = ["draw", "numbers"]

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def numbers(page: Path) -> dict[str, Any]:
    """What the plot shows, read from the page's tables.

    Returns:
        perplexity: tokens of a window -> {student, window, teacher}. speed: student and teacher -> {context: tokens/s}.
        bytes: student and teacher -> memory at the longest context.
    Raises:
        ValueError: a table or a row is missing.
    """
    text = page.read_text()
    head, row = _row(text, "student / teacher", "`rnnzoo`, default")
    perplexity, columns = {}, iter(zip(head, row, strict=True))
    for title, value in columns:
        if length := re.match(r"([\d,]+): student", title):
            (_, window), (teacher, _) = next(columns), next(columns)
            found = {"student": _number(value), "window": _number(window)}
            perplexity[_number(length[1])] = found | {"teacher": _number(re.findall(r"\(([\d.]+)\)", teacher)[0])}
    speed, state = {}, {}
    for column in ("student", "teacher"):
        head, row = _row(text, "decoding, tokens/s", column)
        cells = list(zip(head, row, strict=True))[1:]
        speed[column] = {
            int(title[:-1]) * 1024: _number(value) for title, value in cells if title.endswith("k") and " " not in title
        }
        size, unit = re.findall(r"([\d.]+) (\w+)", row[-1])[0]
        state[column] = float(size) * UNITS[unit]
    return {"perplexity": perplexity, "speed": speed, "bytes": state}


def _row(text: str, table: str, first: str) -> tuple[list[str], list[str]]:
    """Head and one row, whose first cell begins with `first`, of the table whose head holds `table`."""
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    lines = next((lines for lines in tables if table in lines[0]), None)
    if lines is None:
        raise ValueError(f"No table with {table!r} in its head.")
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    row = next((row for row in cells[2:] if row[0].startswith(first)), None)
    if row is None:
        raise ValueError(f"The table with {table!r} has no row {first!r}.")
    return cells[0], row


def _number(text: str) -> float:
    return float(text.strip("*` ").replace(",", ""))


def draw(theme: Theme, data: dict[str, Any]) -> Any:
    """Three panels: perplexity at two lengths, decoding speed by context, memory at the longest context."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 3.1), layout="constrained")
    drawing.patch.set_alpha(0)
    panels = drawing.subplots(1, 3, width_ratios=(1.5, 1.3, 0.8))
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.grey)
        axes.tick_params(colors=theme.ink, labelsize=8.5, length=3)
    _perplexity(panels[0], theme, data["perplexity"])
    _speed(panels[1], theme, data["speed"])
    _memory(panels[2], theme, data["bytes"], max(data["speed"]["student"]))
    return drawing


def _title(axes: Any, theme: Theme, text: str) -> None:
    axes.set_title(text, fontsize=9.5, color=theme.ink, loc="left")


def _colours(theme: Theme) -> dict[str, str]:
    return {"teacher": theme.red, "student": theme.blue, "window": theme.grey}


def _perplexity(axes: Any, theme: Theme, data: dict[float, dict[str, float]]) -> None:
    for i, column in enumerate(("teacher", "student", "window")):
        for group, values in enumerate(data.values()):
            x = group + (i - 1) * 0.29
            axes.bar(x, values[column], 0.25, color=_colours(theme)[column], label=column if group == 0 else None)
            axes.text(x, values[column] + 0.4, f"{values[column]:.2f}", ha="center", fontsize=7, color=theme.ink)
    axes.set_xticks(range(len(data)), [f"{length:,.0f} tokens" for length in data])
    axes.set_ylim(0, 1.32 * max(max(values.values()) for values in data.values()))
    legend = axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left", columnspacing=1, handlelength=1.2)
    for text in legend.get_texts():
        text.set_color(theme.ink)
    _title(axes, theme, "Perplexity (lower is better)")


def _speed(axes: Any, theme: Theme, data: dict[str, dict[int, float]]) -> None:
    for column, points in data.items():
        axes.plot(list(points), list(points.values()), marker="o", markersize=5, color=_colours(theme)[column])
        last = max(points)
        shift = 1.2 if column == "student" else 1.4
        axes.text(last, points[last] + shift, column, ha="right", fontsize=8.5, color=_colours(theme)[column])
    contexts = sorted({context for points in data.values() for context in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * max(max(points.values()) for points in data.values()))
    axes.set_xlabel("tokens of context", fontsize=8.5, color=theme.ink)
    _title(axes, theme, "Decoding, tokens/s on two CPU cores")


def _memory(axes: Any, theme: Theme, data: dict[str, float], context: int) -> None:
    for x, column in enumerate(("teacher", "student")):
        axes.bar(x, data[column] / 1e6, 0.6, color=_colours(theme)[column])
        axes.text(
            x, data[column] / 1e6 * 1.15, f"{data[column] / 1e6:.0f} MB", ha="center", fontsize=8.5, color=theme.ink
        )
    axes.set_yscale("log")
    axes.set_ylim(1, 3 * max(data.values()) / 1e6)
    axes.set_xticks([0, 1], ["teacher", "student"])
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    axes.minorticks_off()
    _title(axes, theme, f"State at {context // 1024}k, MB (log)")
