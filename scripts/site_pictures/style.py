"""The few shapes that all pictures are made of."""

from __future__ import annotations

from typing import Any

from rnnzoo.cards.style import Theme

__all__ = ["arrow", "box", "figure", "label"]


def figure(theme: Theme, width: float, height: float) -> Any:
    """An empty figure of inches, transparent, with one pair of axes without frame, a unit an inch."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height))
    drawing.patch.set_alpha(0)
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return drawing, axes


def box(axes: Any, x: float, y: float, w: float, h: float, colour: str, *, fill: float = 0.25, dashed: bool = False):
    """A rounded box; `fill` is the opacity of its inside."""
    from matplotlib.patches import FancyBboxPatch

    def patch(**style: Any) -> None:
        corners = "round,pad=0,rounding_size=0.05"
        axes.add_patch(FancyBboxPatch((x, y), w, h, corners, **style))

    if fill:
        patch(linewidth=0, facecolor=colour, alpha=fill)
    patch(linewidth=1.4, linestyle="--" if dashed else "-", facecolor="none", edgecolor=colour)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """From `start` to `end`."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.3})


def label(axes: Any, x: float, y: float, text: str, colour: str, *, size: float = 10, **style: Any) -> None:
    """Text, centred unless `ha` says otherwise."""
    axes.text(x, y, text, color=colour, fontsize=size, **{"ha": "center", "va": "center"} | style)
