"""Colours and style of every picture of a card: readable on white and on black pages."""

from __future__ import annotations

__all__ = ["ATTENTION", "BACKGROUNDS", "COLOURS", "GREY", "MARKS", "MIXERS", "STYLE", "WINDOWS"]

BACKGROUNDS = ("#ffffff", "#0d1117")  # the pages that they must be readable on
GREY = "#797979"  # words, axes and grid: the grey whose contrast with both pages is the same, 4.3
# Blue, orange and grey are told apart by the colour-blind; marker and line tell the columns apart as well.
COLOURS = {"student": "#1a7fc4", "teacher": GREY, "window": "#d55e00"}
MARKS = {"student": ("o", "-"), "teacher": ("s", "--"), "window": ("^", "-.")}
ATTENTION = {"full_attention": COLOURS["window"], "sliding_attention": "#b8860b"}
# Of mixers, in order of appearance. Okabe and Ito's, evened out in brightness.
MIXERS = ("#1a7fc4", "#009e73", "#b0679a", "#8a7f00", "#7a6fd0")
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
