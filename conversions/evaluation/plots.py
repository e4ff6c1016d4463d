"""PNG plots of an evaluation. Without matplotlib (extra `eval`) none are written, and a log line says so."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...kernels.errors import RnnzooError

__all__ = ["write_plots"]

_logger = logging.getLogger(__name__)
# Colour and marker both tell the columns apart: the plots must be readable in grey and by the colour-blind.
_STYLES = {"student": ("#0072B2", "o", "-"), "teacher": ("#444444", "s", "--"), "window": ("#D55E00", "^", "-.")}


def write_plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes perplexity_by_position, recall_by_distance, decode_speed and state_bytes as far as they were measured.

    Raises:
        RnnzooError: the folder cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        _logger.warning("No plots: matplotlib is not installed (pip install 'rnnzoo[eval]').")
        return []
    evaluation = results.get("evaluation", {})
    baseline = evaluation.get("window_baseline")
    labels = {
        "student": results.get("model", {}).get("name") or "student",
        "teacher": "teacher",
        "window": f"teacher, window {baseline['window']} + {baseline['sinks']}" if baseline else "teacher, window",
    }
    drawings: dict[str, tuple[str, Callable[..., None]]] = {
        "perplexity_by_position": ("by_position", _positions),
        "recall_by_distance": ("recall", _recall),
        "decode_speed": ("decode", _speed),
        "state_bytes": ("decode", _state),
    }
    written = []
    for name, (part, draw) in drawings.items():
        if rows := evaluation.get(part):
            written.append(_save(folder / f"{name}.png", rows, labels, draw))
    return written


def _save(path: Path, rows: list[dict[str, Any]], labels: dict[str, str], draw: Callable[..., None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, rows, labels)
    # Above the axes: inside, no corner is free in every one of these plots.
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".png")
        os.close(descriptor)
        # Without the default metadata (the library's version) the same numbers give the same file.
        figure.savefig(temporary, metadata={"Software": None})
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise RnnzooError(f"Cannot write {path}: {error.strerror or error}.") from None
    return path


def _series(
    axes: Any, rows: list[dict[str, Any]], labels: dict[str, str], x: Callable[..., float], y: Callable[..., float]
) -> None:
    for column, (colour, marker, line) in _STYLES.items():
        points = sorted((x(row), y(row)) for row in rows if row["column"] == column)
        if points:
            axes.plot(
                *zip(*points, strict=True), line, color=colour, marker=marker, **_marker(column), label=labels[column]
            )


def _marker(column: str) -> dict[str, Any]:
    """The window's is a hollow one around the student's, which it often hides."""
    return {"markersize": 8, "fillstyle": "none"} if column == "window" else {"markersize": 5}


def _ticks(axes: Any, values: set[int]) -> None:
    """Powers of two as the people who chose them wrote them: 16, 512, 1k, 32k."""
    axes.set_xscale("log", base=2)
    ticks = sorted(values)
    axes.set_xticks(ticks, [f"{v // 1024}k" if v >= 1024 and v % 1024 == 0 else str(v) for v in ticks])
    axes.minorticks_off()


def _positions(axes: Any, rows: list[dict[str, Any]], labels: dict[str, str]) -> None:
    """A step for each bucket; the teacher may leave the picture where it breaks, so the scale is logarithmic."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    for column, (colour, _, line) in _STYLES.items():
        buckets = sorted((row for row in rows if row["column"] == column), key=lambda row: row["start"])
        if buckets:
            edges = [bucket["start"] for bucket in buckets] + [buckets[-1]["end"]]
            values = [bucket["perplexity"] for bucket in buckets]
            axes.stairs(values, edges, baseline=None, color=colour, linestyle=line, linewidth=1.8, label=labels[column])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    ends = sorted({row["end"] for row in rows})
    axes.set_xlim(0, ends[-1])
    kept = [end for i, end in enumerate(ends) if i == len(ends) - 1 or ends[-1] - end > ends[-1] * 0.05]
    kept = [end for end in kept if end >= ends[-1] * 0.05]
    axes.set_xticks([0, *kept], ["0", *(f"{end // 1024}k" if end % 1024 == 0 else str(end) for end in kept)])
    axes.set_xlabel("position in one long text (tokens)")
    axes.set_ylabel("perplexity (log scale)")


def _recall(axes: Any, rows: list[dict[str, Any]], labels: dict[str, str]) -> None:
    for column, (colour, marker, line) in _STYLES.items():
        points = sorted((row["distance"], row["accuracy"], row["stderr"]) for row in rows if row["column"] == column)
        if points:
            x, y, error = zip(*points, strict=True)
            style = dict(color=colour, marker=marker, linestyle=line, **_marker(column), capsize=2, elinewidth=0.8)
            axes.errorbar(x, y, yerr=error, label=labels[column], **style)
    axes.axhline(rows[0].get("chance", 0.1), color="#999999", linewidth=1, linestyle=":", label="chance")
    _ticks(axes, {row["distance"] for row in rows})
    axes.set_ylim(-0.05, 1.08)
    axes.set_xlabel("tokens back")
    axes.set_ylabel("right answers (± standard error)")


def _speed(axes: Any, rows: list[dict[str, Any]], labels: dict[str, str]) -> None:
    _series(axes, rows, labels, lambda row: row["context"], lambda row: row["tokens_per_second"])
    _ticks(axes, {row["context"] for row in rows})
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("decoded tokens/s")
    axes.set_title(f"{rows[0].get('device', '')}, {rows[0].get('dtype', '')}, batch 1", fontsize=8, loc="left")


def _state(axes: Any, rows: list[dict[str, Any]], labels: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter

    _series(axes, rows, labels, lambda row: row["context"], lambda row: row["state_bytes"] / 1e6)
    _ticks(axes, {row["context"] for row in rows})
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("bytes kept (MB, log scale)")
