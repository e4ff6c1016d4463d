"""What the page shows of the models, as HTML and SVG: panels with text and figures, and memory by tokens.

Everything that comes from a model or a user is escaped. Colours are those of the project's pictures, light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..cards.style import ATTENTION, DARK, LIGHT
from ..cli.quantities import format_bytes, format_count
from .streaming import Snapshot

__all__ = ["CSS", "chart", "heading", "panel"]

PHASES = {
    "reading": "reading the prompt",
    "answering": "answering",
    "end": "finished",
    "length": "reached the most new tokens",
    "stopped": "stopped",
}
FIRST, LAST = 16, 32768  # tokens, the ends of the chart

# Gradio's own rules for text in HTML (class prose) give every element a colour and margins, hence "!important". It
# takes the sheet apart into single properties, and loses a shorthand with a variable of which one side is overridden.
CSS = f"""
.zoo {{ --student: {LIGHT.blue}; --teacher: {LIGHT.red}; font-variant-numeric: tabular-nums; }}
.dark .zoo {{ --student: {DARK.blue}; --teacher: {DARK.red}; }}"""
CSS += """
.zoo .student { color: var(--student) !important; } .zoo .teacher { color: var(--teacher) !important; }
.zoo-head h1 { font-size: 1.5rem; margin: 0 !important; }
.zoo-head p { margin: 2px 0 0 !important; opacity: .75; }
.zoo-panel { border-style: solid; border-width: 4px 1px 1px; border-left-color: var(--border-color-primary);
  border-right-color: var(--border-color-primary); border-bottom-color: var(--border-color-primary);
  border-radius: 10px; padding: 12px 16px; background: var(--block-background-fill); }
.zoo-panel.is-student { border-top-color: var(--student); } .zoo-panel.is-teacher { border-top-color: var(--teacher); }
.zoo-panel h3 { margin: 0 !important; font-size: 1.1rem; }
.zoo-panel .what { opacity: .75; font-size: .88rem; margin-bottom: 10px; }
.zoo-tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; margin-bottom: 12px; }
.zoo-tile { background: var(--background-fill-secondary); border-radius: 8px; padding: 8px 10px; }
.zoo-tile b { display: block; font-size: 1.45rem; line-height: 1.25; font-weight: 650; white-space: nowrap; }
.zoo-tile span { font-size: .8rem; opacity: .75; }
.zoo-answer { height: 13em; overflow-y: auto; display: flex; flex-direction: column-reverse; }
.zoo-answer > div { margin: 0 0 auto !important; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.zoo-status { border-top: 1px solid var(--border-color-primary); margin-top: 10px; padding-top: 6px; font-size: .8rem;
  opacity: .75; }
.zoo-empty { opacity: .55; }
.zoo-caret { display: inline-block; width: .5em; height: 1em; vertical-align: -.15em;
  background: var(--body-text-color); animation: zoo-blink 1s steps(2) infinite; }
@keyframes zoo-blink { to { opacity: 0; } }
.zoo-chart svg { width: 100%; height: auto; display: block; }
.zoo-chart text { fill: var(--body-text-color); font-size: 13px; }
.zoo-chart .soft { opacity: .75; }
.zoo-chart .grid { stroke: var(--body-text-color); opacity: .15; }
.zoo-chart polyline { fill: none; stroke-width: 2.5; }
.zoo-chart .student polyline { stroke: var(--student); } .zoo-chart .teacher polyline { stroke: var(--teacher); }
.zoo-chart .student :is(text, circle) { fill: var(--student); }
.zoo-chart .teacher :is(text, circle) { fill: var(--teacher); }
"""


def heading(speakers: Sequence[Any]) -> str:
    """The top of the page."""
    names = " and ".join(f'<span class="{s.role}">{html.escape(s.name)}</span>' for s in speakers)
    also = " One prompt, the same settings, in turn on this machine." if len(speakers) > 1 else ""
    return f'<div class="zoo zoo-head"><h1>{names}</h1><p>Text, speed and memory as they come about.{also}</p></div>'


def what_it_is(model: Any) -> str:
    """`135M parameters, 23 recurrent and 7 attention layers, bfloat16`."""
    kinds = list(getattr(model.config, "layer_types", None) or [])
    recurrent = len(kinds) - sum(kind in ATTENTION for kind in kinds)
    if not kinds or not recurrent:
        layers = f"Transformer, {model.config.num_hidden_layers} attention layers"
    elif recurrent == len(kinds):
        layers = f"recurrent, {recurrent} layers"
    else:
        layers = f"hybrid, {recurrent} recurrent and {len(kinds) - recurrent} attention layers"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{layers}, {format_count(model.num_parameters())} parameters, {dtype}"


def panel(speaker: Any, now: Snapshot | None) -> str:
    """One model: what it is, its speed and memory, and its answer so far."""
    speed = now.tokens_per_second if now is not None else None
    memory = "state" if what_it_is(speaker.model).startswith("recurrent") else "cache"
    tiles = (
        (f"{speed:.1f}" if speed else "–", "tokens/s"),
        (format_bytes(now.state_bytes) if now is not None and now.state_bytes else "–", f"{memory} in memory"),
        (f"{now.tokens:,}" if now is not None else "–", "tokens so far"),
    )
    cells = "".join(f'<div class="zoo-tile"><b>{value}</b><span>{name}</span></div>' for value, name in tiles)
    text, status = '<span class="zoo-empty">The answer will stand here.</span>', "ready"
    if now is not None:
        caret = '<span class="zoo-caret"></span>' if now.running else ""
        text, status = html.escape(now.text) + caret, _status(now)
    return (
        f'<div class="zoo zoo-panel is-{speaker.role}" data-phase="{now.phase if now else "ready"}">'
        f'<h3 class="{speaker.role}">{html.escape(speaker.name)}</h3>'
        f'<div class="what">{speaker.role}: {html.escape(what_it_is(speaker.model))}</div>'
        f'<div class="zoo-tiles">{cells}</div><div class="zoo-answer"><div>{text}</div></div>'
        f'<div class="zoo-status">{status}</div></div>'
    )


def _status(now: Snapshot) -> str:
    words = PHASES[now.phase]
    if now.phase == "reading":
        words += f": {now.read_tokens:,} of {now.prompt_tokens:,} tokens"
    else:
        words += f": {now.new_tokens:,} tokens" + (f" in {now.answer_seconds:.1f} s" if now.answer_seconds else "")
    if now.read_seconds and now.phase != "reading":
        words += f"; prompt of {now.prompt_tokens:,} tokens read in {now.read_seconds:.1f} s"
    return words


def chart(speakers: Sequence[Any], now: Sequence[Snapshot | None]) -> str:
    """Memory by tokens, both axes logarithmic: a line for each model, and a dot where it is."""
    contexts = [2**n for n in range(int(math.log2(FIRST)), int(math.log2(LAST)) + 1)]
    lines = [[(n, max(1, speaker.memory.at(n))) for n in contexts] for speaker in speakers]
    sizes = [size for line in lines for _, size in line]
    low = 10 ** math.floor(math.log10(min(sizes)))
    high = 10 ** math.ceil(math.log10(max(sizes) * 1.01))
    left, right, top, bottom, width, height = 74, 190, 26, 38, 1100, 210

    def x(tokens: float) -> float:
        share = math.log(max(FIRST, min(LAST, tokens)) / FIRST) / math.log(LAST / FIRST)
        return left + share * (width - left - right)

    def y(size: float) -> float:
        share = math.log(max(low, min(high, size)) / low) / math.log(high / low)
        return height - bottom - share * (height - top - bottom)

    parts = _grid(x, y, low, high, left, width - right, height - bottom, top)
    ends = _apart([y(line[-1][1]) for line in lines], 17)
    for speaker, line, snapshot, end in zip(speakers, lines, now, ends, strict=True):
        points = " ".join(f"{x(n):.1f},{y(size):.1f}" for n, size in line)
        parts.append(
            f'<g class="{speaker.role}"><polyline points="{points}"/>'
            f'<text x="{width - right + 10}" y="{end + 4:.1f}">{speaker.role}: {format_bytes(line[-1][1])}</text>'
        )
        if snapshot is not None and snapshot.tokens:
            spot = f'cx="{x(snapshot.tokens):.1f}" cy="{y(snapshot.state_bytes or low):.1f}"'
            parts.append(f'<circle {spot} r="6"/>')
        parts.append("</g>")
    label = f"Memory by tokens of context, up to {LAST:,}"
    picture = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<div class="zoo zoo-chart">{picture}</div>'


def _grid(x: Callable, y: Callable, low: int, high: int, left: int, right: int, bottom: int, top: int) -> list[str]:
    parts = []
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = y(10**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="soft" x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{format_bytes(10**power)}</text>'
        )
    for tokens in (16, 128, 1024, 8192, 32768):
        parts.append(f'<line class="grid" x1="{x(tokens):.1f}" x2="{x(tokens):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="soft" x="{x(tokens):.1f}" y="{bottom + 17}" text-anchor="middle">{tokens:,}</text>')
    middle = (left + right) / 2
    parts.append(f'<text class="soft" x="{middle}" y="{bottom + 33}" text-anchor="middle">tokens of context</text>')
    parts.append(f'<text class="soft" x="{right + 10}" y="{top - 12}">memory at {LAST:,} tokens</text>')
    return parts


def _apart(places: list[float], least: float) -> list[float]:
    """The places of labels, moved so that no two are nearer than `least`."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda i: places[i])
    for before, after in zip(order, order[1:], strict=False):
        moved[after] = max(moved[after], moved[before] + least)
    return moved
