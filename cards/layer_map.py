"""The map of a model's layers: what mixes tokens in each, how far it sees exactly, how many bytes it keeps."""

from __future__ import annotations

from typing import Any

from .style import ATTENTION, BACKGROUNDS, GREY, INK, MIXERS, WINDOWS

__all__ = ["draw_layers"]


def draw_layers(figure: Any, part: dict[str, Any], labels: dict[str, str]) -> None:
    """One column a layer, one row a key-value head where heads have windows of their own; bars: bytes of state."""
    kinds = [str(kind) for kind in part["layer_types"]]
    windows = part.get("windows") or []
    sizes = part.get("layer_state_bytes")
    heads = max((len(row) for row in windows if row), default=1)
    figure.set_size_inches(min(16, max(6.4, 1.0 + 0.3 * len(kinds))), 1.5 + 0.32 * heads + (1.1 if sizes else 0))
    if sizes:
        bars, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1.1, 0.3 * heads + 0.2])
        _bars(bars, sizes, kinds)
    else:
        axes = figure.subplots()
    _cells(axes, kinds, windows, heads)
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    axes.set_ylim(heads - 0.4, -0.6)
    every = max(1, len(kinds) // 32)
    axes.set_xticks(range(0, len(kinds), every))
    axes.tick_params(labelsize=7 if len(kinds) > 16 else 9, length=0)
    axes.set_yticks(range(heads) if heads > 1 else [], [str(head) for head in range(heads)] if heads > 1 else [])
    axes.set_ylabel("kv head" if heads > 1 else "", fontsize=9)
    axes.set_xlabel("layer", fontsize=9)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    _key(figure, kinds, windows)


def _palette(kinds: list[str]) -> dict[str, str]:
    mixers = [kind for kind in dict.fromkeys(kinds) if kind not in ATTENTION]
    colours = {kind: MIXERS[place % len(MIXERS)] for place, kind in enumerate(mixers)}
    return colours | ATTENTION


def _cells(axes: Any, kinds: list[str], windows: list[Any], heads: int) -> None:
    from matplotlib.patches import Rectangle

    longest = max((size for row in windows if row for size in row), default=1)
    palette = _palette(kinds)
    for layer, kind in enumerate(kinds):
        own = windows[layer] if layer < len(windows) else None
        if not own:
            axes.add_patch(Rectangle((layer - 0.46, -0.44), 0.92, heads - 0.12, color=palette[kind], linewidth=0))
            continue
        for head, size in enumerate(own):
            shade = _shade(size, longest)
            axes.add_patch(Rectangle((layer - 0.46, head - 0.44), 0.92, 0.88, color=shade, linewidth=0))
            ink = BACKGROUNDS[0] if sum(shade) < 1.5 else INK
            shown = f"{size // 1024}k" if size >= 1024 and size % 1024 == 0 else str(size)
            axes.text(layer, head, shown, ha="center", va="center", color=ink, fontsize=6 if len(kinds) > 16 else 8)


def _shade(size: int, longest: int) -> tuple[float, ...]:
    """By the logarithm of the window, from 16 tokens up."""
    from math import log2

    share = max(0.0, min(1.0, (log2(max(size, 16)) - 4) / max(1.0, log2(max(longest, 32)) - 4)))
    return tuple(a + share * (b - a) for a, b in zip(*WINDOWS, strict=True))


def _bars(axes: Any, sizes: list[int], kinds: list[str]) -> None:
    palette = _palette(kinds)
    axes.bar(range(len(sizes)), [size / 1e3 for size in sizes], 0.92, color=[palette[kind] for kind in kinds])
    axes.set_ylabel("state, kB", fontsize=9)
    axes.tick_params(labelsize=8, length=0)
    axes.grid(axis="x", visible=False)


def _key(figure: Any, kinds: list[str], windows: list[Any]) -> None:
    from matplotlib.patches import Patch

    palette = _palette(kinds)
    patches = [
        Patch(color=palette[kind], label=f"{kind.replace('_', ' ')}, {kinds.count(kind)} of {len(kinds)}")
        for kind in dict.fromkeys(kinds)
    ]
    title = "numbers: exact window in tokens" if any(windows) else None
    legend = figure.legend(handles=patches, loc="outside upper center", ncols=3, fontsize=9, title=title)
    legend.get_title().set(color=GREY, fontsize=9)
