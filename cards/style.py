"""Colours and style of every picture: a card's, readable on white and on black pages; and two themes for the others."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ATTENTION",
    "BACKGROUNDS",
    "COLOURS",
    "DARK",
    "GREY",
    "INK",
    "LIGHT",
    "MARKS",
    "MIXERS",
    "STYLE",
    "WINDOWS",
    "Theme",
]

BACKGROUNDS = ("#ffffff", "#0d1117")  # the pages that they must be readable on
GREY = "#797979"  # words, axes and grid: the grey whose contrast with both pages is the same, 4.3
# Blue, orange and grey are told apart by the colour-blind; marker and line tell the columns apart as well.
COLOURS = {"student": "#1a7fc4", "teacher": GREY, "window": "#d55e00"}
MARKS = {"student": ("o", "-"), "teacher": ("s", "--"), "window": ("^", "-.")}
ATTENTION = {"full_attention": COLOURS["window"], "sliding_attention": "#b8860b"}
# Of mixers, in order of appearance. Okabe and Ito's, evened out in brightness.
MIXERS = ("#1a7fc4", "#009e73", "#b0679a", "#8a7f00", "#7a6fd0")
INK = "#10202c"  # of words on light blue
WINDOWS = (0.72, 0.86, 0.95), (0.02, 0.24, 0.44)  # short ones light blue, long ones dark blue
STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "font.size": 10,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "lines.linewidth": 2,
}


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
