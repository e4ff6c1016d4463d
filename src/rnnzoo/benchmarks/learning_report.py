"""What `learning` found, as a Markdown table and as a plot: one row an architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cards.style import LIGHT
from ..conversions.data.synthetic import LANGUAGES

__all__ = ["draw", "table"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One figure of an architecture.

    Attributes:
        task, keys: where it stands in the records; two keys are two figures, such as accuracy at 40 and at 256.
        show: a figure in the table. chance: of an accuracy. logarithmic: axis of the plot.
    """

    title: str
    task: str
    keys: tuple[str, ...]
    show: Callable[[float], str]
    chance: float | None = None
    logarithmic: bool = False


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


COLUMNS = (
    Column("text, loss", "text", ("loss",), "{:.3f}".format),
    Column("recall of 16 pairs", "recall", ("accuracy",), _percent, 1 / 32),
    *(
        Column(
            f"{name.replace('_', ' ')}, length 40 / 256",
            name,
            ("accuracy", "accuracy_256"),
            _percent,
            0.2 if name == "modular_arithmetic" else 0.5,
        )
        for name in LANGUAGES
    ),
    Column("training, tokens/s", "text", ("tokens_per_second",), "{:,.0f}".format, logarithmic=True),
    Column("state, bytes", "text", ("state_bytes",), "{:,}".format, logarithmic=True),
)


def _by_architecture(records: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """Architecture -> task -> record; best text loss first, then those without one by name."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        found.setdefault(record["architecture"], {})[record["task"]] = record

    def order(name: str) -> tuple[float, str]:
        return found[name].get("text", {}).get("loss", float("inf")), name

    return {name: found[name] for name in sorted(found, key=order)}


def table(records: Iterable[Record]) -> str:
    """Markdown; "-" where nothing was measured. Parameters are those of the text model."""
    head = ["architecture", "parameters", *(column.title for column in COLUMNS)]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for name, tasks in _by_architecture(records).items():
        model = tasks.get("text") or next(iter(tasks.values()))
        cells = [name, f"{model['parameters']:,}"]
        for column in COLUMNS:
            record = tasks.get(column.task)
            cells.append(" / ".join(column.show(record[key]) for key in column.keys) if record else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(records: Iterable[Record], path: Path) -> None:
    """A panel a column, a row an architecture. Two figures of one column are a filled and an open point.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter

    rows = _by_architecture(records)
    names = list(rows)
    columns = [column for column in COLUMNS if any(column.task in tasks for tasks in rows.values())]
    size = (2.0 + 1.75 * len(columns), 1.3 + 0.24 * len(names))
    figure = Figure(figsize=size, dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        axes.set_title(column.title.replace(", ", ",\n"), fontsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=7, length=2)
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.grid(axis="y", alpha=0.25)
        if column.logarithmic:
            axes.set_xscale("log")
            values = [tasks[column.task][column.keys[0]] for tasks in rows.values() if column.task in tasks]
            narrow = max(values) < 30 * min(values)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if narrow else (1.0,)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if column.chance is not None:
            axes.axvline(column.chance, color=LIGHT.faint, linestyle=":", linewidth=1)
            axes.set_xlim(-0.04, 1.04)
            axes.set_xticks([0.0, 0.5, 1.0])
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        for y, name in enumerate(names):
            if record := rows[name].get(column.task):
                values = [record[key] for key in column.keys]
                if len(values) > 1:
                    axes.plot(values, [y] * len(values), color=LIGHT.faint, linewidth=1.5, zorder=1)
                    axes.scatter(
                        values[1:], [y], s=26, facecolors="white", edgecolors=LIGHT.red, linewidths=1.3, zorder=3
                    )
                axes.scatter(values[:1], [y], s=22, color=LIGHT.blue, zorder=2)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel("filled: at length 40, open: at length 256, dotted: chance", fontsize=7, color=LIGHT.grey)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
