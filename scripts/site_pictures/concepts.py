"""Pictures of the ideas: a cache and a state, a window before a state, a hybrid, and the stages of a conversion."""

from __future__ import annotations

from typing import Any

from rnnzoo.cards.style import Theme

from .style import arrow, box, figure, label

__all__ = ["conversion", "hybrid", "state", "window"]


def state(theme: Theme) -> Any:
    """Five tokens: the cache has a column for each, the state stays one box."""
    drawing, axes = figure(theme, 8, 4.3)
    label(axes, 0.15, 4.05, "Attention keeps the keys and values of every token", theme.ink, size=11, ha="left")
    label(
        axes, 0.15, 1.85, "A recurrence writes every token into one state of fixed size", theme.ink, size=11, ha="left"
    )
    for token in range(5):
        left = 0.55 + token * 1.45
        for kept in range(token + 1):
            box(axes, left + 0.5 + (kept - token / 2) * 0.2 - 0.075, 2.65, 0.15, 0.95, theme.red, fill=0.45)
        label(axes, left + 0.5, 2.4, f"token {token + 1}", theme.grey, size=9)
        box(axes, left + 0.2, 0.55, 0.6, 0.9, theme.blue, fill=0.45)
        label(axes, left + 0.5, 1.0, f"$S_{token + 1}$", theme.ink, size=12)
        label(axes, left + 0.5, 0.3, f"token {token + 1}", theme.grey, size=9)
        if token:
            arrow(axes, (left - 0.62, 1.0), (left + 0.17, 1.0), theme.ink)
    return drawing


def window(theme: Theme) -> Any:
    """One query and what it reads: sinks and window exactly, all between them through the state."""
    drawing, axes = figure(theme, 8, 3.5)
    kinds = ["sink"] * 2 + ["old"] * 10 + ["window"] * 5 + ["now"]
    colours = {"sink": theme.green, "old": theme.blue, "window": theme.green, "now": theme.red}
    for i, kind in enumerate(kinds):
        faded = kind == "old"
        box(axes, 0.32 + i * 0.41, 1.0, 0.32, 0.5, colours[kind], fill=0.12 if faded else 0.5, dashed=faded)
    middle = 0.32 + 7 * 0.41 - 0.05
    box(axes, middle - 0.95, 2.15, 1.9, 0.75, theme.blue, fill=0.45)
    label(axes, middle, 2.52, "state: one matrix", theme.ink)
    for i in range(3, 12, 2):
        arrow(axes, (0.32 + i * 0.41 - 0.05, 1.55), (middle + (i - 7) * 0.14, 2.12), theme.blue)
    label(axes, 0.32 + 0.36, 0.72, "sinks", theme.green)
    label(axes, middle, 0.72, "older tokens: their keys and values are gone", theme.blue)
    label(axes, 0.32 + 14.4 * 0.41, 0.72, "window", theme.green)
    now = 0.32 + 17 * 0.41 + 0.16
    label(axes, now, 0.72, "query", theme.red)
    label(
        axes,
        4,
        0.25,
        "exact softmax weights for sinks and window, linear weights for the state, one denominator",
        theme.ink,
    )
    arrow(axes, (middle + 1.0, 2.52), (now - 0.02, 1.56), theme.red)
    return drawing


def hybrid(theme: Theme) -> Any:
    """Two stacks of eight layers: all recurrent, and every fourth attention; what each keeps for one sequence."""
    drawing, axes = figure(theme, 8, 4.5)
    stacks = (("--keep none", 0.6, []), ("--keep 1/4", 4.4, [3, 7]))
    for title, left, attention in stacks:
        label(axes, left + 0.85, 4.2, title, theme.ink, size=11, family="monospace")
        for layer in range(8):
            bottom = 0.6 + layer * 0.42
            full = layer in attention
            colour = theme.red if full else theme.blue
            box(axes, left, bottom, 1.7, 0.34, colour, fill=0.4)
            label(axes, left + 0.85, bottom + 0.17, "attention" if full else "recurrent", theme.ink, size=9)
            # What the layer keeps: a cache that goes on, or one box.
            kept = 9 if full else 1
            for i in range(kept):
                box(axes, left + 1.85 + i * 0.14, bottom + 0.07, 0.1, 0.2, colour, fill=0.6)
            if full:
                label(axes, left + 3.15, bottom + 0.16, "...", theme.red, size=11, ha="left")
    label(axes, 2.2, 0.25, "memory: constant", theme.blue)
    label(axes, 6.0, 0.25, "memory: grows, in two layers of eight", theme.red)
    return drawing


def conversion(theme: Theme) -> Any:
    """From teacher to student: what is copied, what each stage learns."""
    drawing, axes = figure(theme, 8, 3.9)
    for left, title, mixer, colour in ((0.3, "teacher", "attention", theme.red), (5.9, "student", "mixer", theme.blue)):
        label(axes, left + 0.9, 3.65, title, theme.ink, size=11)
        for i, part in enumerate(("embeddings", mixer, "norms, MLP", "LM head")):
            mine = part == mixer
            box(
                axes, left, 0.95 + (3 - i) * 0.62, 1.8, 0.5, colour if mine else theme.grey, fill=0.45 if mine else 0.15
            )
            label(axes, left + 0.9, 1.2 + (3 - i) * 0.62, part, theme.ink)
    for i, words in enumerate(("copied", "starts from q, k, v, o", "copied", "copied")):
        height = 1.2 + (3 - i) * 0.62
        colour = theme.blue if i == 1 else theme.grey
        arrow(axes, (2.2, height), (5.8, height), colour)
        label(axes, 4, height + 0.15, words, colour, size=9.5)
    label(
        axes, 4, 0.62, "then:  calibrate  (closed form)    align  (layer by layer)    train  (end to end)", theme.green
    )
    label(axes, 4, 0.25, "then measured beside the teacher, on text held out", theme.ink)
    return drawing
