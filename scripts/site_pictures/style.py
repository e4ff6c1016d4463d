"""What all pictures share: two themes, one for light and one for dark pages, and the few shapes they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["DARK", "LIGHT", "Theme", "arrow", "box", "figure", "label"]


@dataclass(frozen=True)
class Theme:
    """Colours, as matplotlib takes them. Blue is the student, vermilion attention, green what is trained or exact.

    `ink` is text and lines, `faint` what stands behind, `paper` the page (only inside hollow marks).
    """

    name: str
    ink: str
    faint: str
    paper: str
    blue: str
    red: str
    green: str
    grey: str


LIGHT = Theme("light", "#24292f", "#d0d7de", "#ffffff", "#0072b2", "#d55e00", "#117a52", "#6e7781")
DARK = Theme("dark", "#e6edf3", "#444c56", "#1e2129", "#56b4e9", "#f0883e", "#3fb68b", "#9aa4af")


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
