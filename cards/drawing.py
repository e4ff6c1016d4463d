"""How each picture of a card is drawn. Imported only where matplotlib is; `plots` says what is drawn when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .layer_map import draw_layers
from .style import COLOURS, GREY, MARKS

__all__ = ["DRAWINGS"]

Rows = list[dict[str, Any]]
Labels = dict[str, str]


def _finish(figure: Any, axes: Any, x: str, y: str) -> None:
    """The axes' names, and the legend above: inside, no corner is free in every one of these plots."""
    axes.set(xlabel=x, ylabel=y)
    figure.legend(loc="outside upper center", ncols=4, fontsize=9)


def _series(axes: Any, rows: Rows, labels: Labels, x: Callable[..., float], y: Callable[..., float]) -> None:
    for column, (marker, line) in MARKS.items():
        points = sorted((x(row), y(row)) for row in rows if row["column"] == column)
        if points:
            style = dict(color=COLOURS[column], marker=marker, label=labels[column])
            axes.plot(*zip(*points, strict=True), line, **style, **_marker(column))


def _marker(column: str) -> dict[str, Any]:
    """The window's is a hollow one around the student's, which it often hides."""
    return {"markersize": 9, "fillstyle": "none"} if column == "window" else {"markersize": 6}


def _ticks(axes: Any, values: set[int]) -> None:
    """Powers of two as the people who chose them wrote them: 16, 512, 1k, 32k."""
    axes.set_xscale("log", base=2)
    ticks = sorted(values)
    axes.set_xticks(ticks, [f"{v // 1024}k" if v >= 1024 and v % 1024 == 0 else str(v) for v in ticks])
    axes.minorticks_off()


def _positions(figure: Any, rows: Rows, labels: Labels) -> None:
    """A step for each bucket; the teacher may leave the picture where it breaks, so the scale is logarithmic."""
    axes = figure.subplots()
    for column, (_, line) in MARKS.items():
        buckets = sorted((row for row in rows if row["column"] == column), key=lambda row: row["start"])
        if buckets:
            edges = [bucket["start"] for bucket in buckets] + [buckets[-1]["end"]]
            values = [bucket["perplexity"] for bucket in buckets]
            style = dict(color=COLOURS[column], linestyle=line, linewidth=2, label=labels[column])
            axes.stairs(values, edges, baseline=None, **style)
    _log_scale(axes)
    ends = sorted({row["end"] for row in rows})
    axes.set_xlim(0, ends[-1])
    kept = [end for i, end in enumerate(ends) if i == len(ends) - 1 or ends[-1] - end > ends[-1] * 0.05]
    kept = [end for end in kept if end >= ends[-1] * 0.05]
    axes.set_xticks([0, *kept], ["0", *(f"{end // 1024}k" if end % 1024 == 0 else str(end) for end in kept)])
    _finish(figure, axes, "position in one long text (tokens)", "perplexity (log scale)")


def _log_scale(axes: Any) -> None:
    """With plain numbers; nearly equal values still get a few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    marks = (1,) if high > 300 * low else (1, 3) if high > 30 * low else (1, 1.5, 2, 3, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=marks) if high > 3 * low else MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.minorticks_off()


def _recall(figure: Any, rows: Rows, labels: Labels) -> None:
    axes = figure.subplots()
    for column, (marker, line) in MARKS.items():
        points = sorted(
            (row["distance"], row["accuracy"], row.get("stderr") or 0) for row in rows if row["column"] == column
        )
        if points:
            x, y, error = zip(*points, strict=True)
            style = dict(color=COLOURS[column], marker=marker, linestyle=line, **_marker(column))
            axes.errorbar(x, y, yerr=error, label=labels[column], **style, capsize=3, elinewidth=1)
    axes.axhline(rows[0].get("chance", 0.1), color=GREY, linewidth=1.2, linestyle=":", label="chance")
    _ticks(axes, {row["distance"] for row in rows})
    axes.set_ylim(-0.05, 1.08)
    _finish(figure, axes, "tokens back", "right answers (± standard error)")


def _speed(figure: Any, rows: Rows, labels: Labels) -> None:
    axes = figure.subplots()
    _series(axes, rows, labels, lambda row: row["context"], lambda row: row["tokens_per_second"])
    _ticks(axes, {row["context"] for row in rows})
    axes.set_ylim(bottom=0)
    axes.set_title(f"{rows[0].get('device', '')}, {rows[0].get('dtype', '')}, batch 1", fontsize=9, loc="left")
    _finish(figure, axes, "tokens of context", "decoded tokens/s")


def _state(figure: Any, rows: Rows, labels: Labels) -> None:
    from matplotlib.ticker import FuncFormatter

    axes = figure.subplots()
    _series(axes, rows, labels, lambda row: row["context"], lambda row: row["state_bytes"] / 1e6)
    _ticks(axes, {row["context"] for row in rows})
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    _finish(figure, axes, "tokens of context", "bytes kept (MB, log scale)")


def _ladder(figure: Any, part: dict[str, Any], labels: Labels) -> None:
    """One point a stage, the teacher as a line below."""
    stages, teacher = part["stages"], part["teacher"]
    axes = figure.subplots()
    values = [stage["perplexity"] for stage in stages]
    errors = [stage.get("perplexity_stderr") or 0 for stage in stages]
    style = dict(color=COLOURS["student"], marker="o", capsize=3, elinewidth=1, label=labels["student"])
    axes.errorbar(range(len(values)), values, yerr=errors, **style)
    for place, value in enumerate(values):
        shown = f"{value:,.4g}" if value < 1e4 else f"{value:.1e}"
        axes.annotate(shown, (place, value), (0, 9), textcoords="offset points", ha="center", fontsize=9)
    if teacher:
        axes.axhline(
            teacher["value"], color=COLOURS["teacher"], linestyle="--", label=f"teacher, {teacher['value']:.4g}"
        )
    axes.margins(x=0.12, y=0.15)
    _log_scale(axes)
    axes.set_xticks(range(len(values)), [str(stage["name"]) for stage in stages], rotation=20 if len(values) > 5 else 0)
    _finish(figure, axes, "", "perplexity (log scale)")


DRAWINGS: dict[str, Callable[[Any, Any, Labels], None]] = {
    "plots/perplexity_by_position.png": _positions,
    "plots/recall_by_distance.png": _recall,
    "plots/state_bytes.png": _state,
    "plots/decode_speed.png": _speed,
    "plots/stages.png": _ladder,
    "plots/layers.png": draw_layers,
}
