"""Pictures of the code: the way of a token while a model decodes, and the way of a conversion."""

from __future__ import annotations

from typing import Any

from rnnzoo.cards.style import Theme

from .style import arrow, box, figure, label

__all__ = ["conversion_path", "token_path"]

WIDTH, HEIGHT = 2.3, 0.72


def token_path(theme: Theme) -> Any:
    """From `generate()` down to C and back: layer by layer the first time, replayed for all later tokens."""
    drawing, axes = figure(theme, 8, 5.5)
    normal = (
        ("generate()", "zoo/core/generation.py", theme.grey),
        ("model: blocks, norms, MLPs", "zoo/core/model.py", theme.grey),
        ("mixer: projections, gates", "zoo/<name>/modeling_<name>.py", theme.blue),
        ("dispatch: which backend", "kernels/dispatch.py", theme.blue),
        ("one step of the recurrence", "kernels/<name>/cpu.c", theme.green),
    )
    label(axes, 1.75, 5.25, "first token", theme.ink, size=11)
    for row, (title, file, colour) in enumerate(normal):
        _room(axes, theme, 0.6, 4.2 - row, title, file, colour)
        if row:
            arrow(axes, (1.75, 5.2 - row - 0.02), (1.75, 4.92 - row + 0.02), theme.ink)
    label(axes, 5.95, 5.25, "all later tokens", theme.ink, size=11)
    _room(axes, theme, 4.8, 4.2, "generate()", "zoo/core/generation.py", theme.grey)
    _room(axes, theme, 4.8, 3.2, "replay", "zoo/core/decoding.py", theme.blue)
    _room(axes, theme, 4.8, 0.2, "a few C calls per layer", "kernels/tape/cpu.c", theme.green)
    arrow(axes, (5.95, 4.18), (5.95, 3.94), theme.ink)
    arrow(axes, (5.95, 3.18), (5.95, 0.94), theme.ink)
    box(axes, 3.35, 1.55, 1.0, 1.05, theme.red, fill=0.3)
    label(axes, 3.85, 2.2, "tape", theme.ink)
    label(axes, 3.85, 1.9, "kernels/tape", theme.grey, size=7.5, family="monospace")
    for row in (2, 4):
        arrow(axes, (2.92, 4.56 - row), (3.33, 2.3 if row == 2 else 1.75), theme.red)
    arrow(axes, (4.37, 2.1), (5.9, 2.1), theme.red)
    label(axes, 3.85, 2.78, "recorded", theme.red, size=9)
    label(axes, 5.15, 2.25, "replayed", theme.red, size=9)
    box(axes, 6.35, 1.5, 1.45, 0.9, theme.green, fill=0.2)
    label(axes, 7.07, 2.05, "states", theme.ink)
    label(axes, 7.07, 1.75, "zoo/core/cache.py", theme.grey, size=7.5, family="monospace")
    arrow(axes, (6.5, 0.94), (6.9, 1.48), theme.green)
    return drawing


def conversion_path(theme: Theme) -> Any:
    """From the command to the card: who calls whom, and what lies on disk."""
    drawing, axes = figure(theme, 8, 5.3)
    rooms = (
        (4.5, "rnnzoo convert", "convert.py", theme.grey),
        (3.5, "order, resume, restart", "pipeline.py", theme.blue),
        (2.5, "one stage", "stages/<kind>.py", theme.blue),
        (1.5, "teacher and student layers", "layers.py", theme.green),
        (0.5, "closed forms, allocation", "fit/", theme.green),
    )
    for row, (height, title, file, colour) in enumerate(rooms):
        _room(axes, theme, 2.85, height, title, file, colour)
        if row:
            arrow(axes, (4.0, height + 0.98), (4.0, height + HEIGHT + 0.02), theme.ink)
    _room(axes, theme, 0.2, 4.5, "recipe: a list of stages", "recipes/", theme.grey)
    _room(axes, theme, 0.2, 2.5, "teacher, tokenizer, text", "context.py", theme.blue)
    _room(axes, theme, 0.2, 1.5, "families, text", "teachers/  data/", theme.grey)
    _room(axes, theme, 5.5, 3.5, "OUT/.rnnzoo: finished stages", "run_folder.py", theme.red)
    _room(axes, theme, 5.5, 2.5, "teacher, student, window", "evaluation/", theme.grey)
    _room(axes, theme, 5.5, 1.5, "results.json, then the card", "cards/", theme.grey)
    arrow(axes, (2.52, 4.86), (2.83, 4.86), theme.ink)
    arrow(axes, (2.52, 2.86), (2.83, 2.86), theme.ink)
    arrow(axes, (1.35, 2.24), (1.35, 2.48), theme.ink)
    arrow(axes, (5.17, 3.86), (5.48, 3.86), theme.red)
    arrow(axes, (6.65, 3.48), (6.65, 3.24), theme.ink)
    arrow(axes, (6.65, 2.48), (6.65, 2.24), theme.ink)
    return drawing


def _room(axes: Any, theme: Theme, x: float, y: float, title: str, file: str, colour: str) -> None:
    box(axes, x, y, WIDTH, HEIGHT, colour, fill=0.25)
    label(axes, x + WIDTH / 2, y + 0.47, title, theme.ink, size=9.5)
    label(axes, x + WIDTH / 2, y + 0.19, file, theme.grey, size=7.5, family="monospace")
