"""The pictures of a card, drawn from results.json: PNG files that are readable on white and on black pages.

Every picture names the numbers that it was drawn from (a hash in the file), so that one whose numbers have changed
is drawn again, and one that cannot be drawn again is not shown. Without matplotlib (extra `plots`) none are drawn.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ..kernels.errors import RnnzooError
from ..kernels.files import replacing
from .style import STYLE

__all__ = ["PLOTS", "current_plots", "drawn_from", "write_plots"]

_logger = logging.getLogger(__name__)
_VERSION = 3  # of the drawing: raise it and every picture is drawn again

# Name: (title, what of results.json is drawn).
PLOTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "plots/perplexity_by_position.png": ("Perplexity by position in one long text", lambda r: _part(r, "by_position")),
    "plots/recall_by_distance.png": ("Recall by distance", lambda r: _part(r, "recall")),
    "plots/state_bytes.png": ("State bytes by context", lambda r: _part(r, "decode")),
    "plots/decode_speed.png": ("Decoding speed by context", lambda r: _part(r, "decode")),
    "plots/stages.png": ("Perplexity after each stage", lambda r: _ladder(r)),
    "plots/layers.png": ("What each layer is", lambda r: _layers(r)),
}


def _part(results: dict[str, Any], name: str) -> Any:
    return (results.get("evaluation") or {}).get(name) or None


def _ladder(results: dict[str, Any]) -> Any:
    """Needs two measured stages: one is no ladder."""
    conversion = results.get("conversion") or {}
    steps = [stage for stage in conversion.get("stages") or [] if stage.get("perplexity") is not None]
    return {"stages": steps, "teacher": conversion.get("teacher_perplexity")} if len(steps) > 1 else None


def _layers(results: dict[str, Any]) -> Any:
    model = results.get("model") or {}
    names = ("layer_types", "windows", "layer_state_bytes")
    return {name: model.get(name) for name in names} if model.get("layer_types") else None


def _labels(results: dict[str, Any]) -> dict[str, str]:
    baseline = (results.get("evaluation") or {}).get("window_baseline")
    name = os.path.basename(str((results.get("model") or {}).get("name") or "this model").rstrip("/"))
    return {
        "student": name if len(name) <= 40 else f"{name[:39]}…",
        "teacher": "teacher",
        "window": f"teacher, window {baseline['window']} + {baseline['sinks']}" if baseline else "teacher, window",
    }


def _digest(name: str, results: dict[str, Any]) -> str:
    drawn = [_VERSION, name, PLOTS[name][1](results), _labels(results)]
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The hash of the numbers that a picture was drawn from; None: it is not one of ours."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    place = 8
    while data[:8] == b"\x89PNG\r\n\x1a\n" and place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        if data[place + 4 : place + 8] == b"tEXt":
            key, _, value = data[place + 8 : place + 8 + length].partition(b"\0")
            if key == b"Source":
                return value.decode("latin-1").removeprefix("results.json ")
        place += 12 + length
    return None


def current_plots(results: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Those of PLOTS that lie in `folder` and show the numbers of `results`."""
    return tuple(
        name
        for name, (_, part) in PLOTS.items()
        if part(results) is not None and drawn_from(folder / name) == _digest(name, results)
    )


def write_plots(results: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Draws those of PLOTS whose numbers are in `results` and that `folder` does not hold yet.

    Args:
        results: results.json as read. folder: the output folder; the pictures go into its `plots`.
    Returns:
        The names of all pictures that show these numbers.
    Raises:
        RnnzooError: the folder cannot be written.
    """
    wanted = [name for name, (_, part) in PLOTS.items() if part(results) is not None]
    there = current_plots(results, folder)
    missing = [name for name in wanted if name not in there]
    if not missing:
        return there
    if importlib.util.find_spec("matplotlib") is None:
        _say_no_plots()
        return there
    for name in missing:
        _draw(folder / name, name, results)
    return current_plots(results, folder)


@functools.cache  # once for a command: the evaluation asks for plots, and so does its card
def _say_no_plots() -> None:
    _logger.warning("No plots: matplotlib is not installed (pip install 'rnnzoo[plots]').")


def _draw(path: Path, name: str, results: dict[str, Any]) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .drawing import DRAWINGS

    with rc_context(cast("Any", STYLE)):
        figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        DRAWINGS[name](figure, PLOTS[name][1](results), _labels(results))
        _save(figure, path, {"Software": None, "Source": f"results.json {_digest(name, results)}"})


def _save(figure: Any, path: Path, metadata: dict[str, str | None]) -> None:
    """Without the default metadata (the library's version) the same numbers give the same file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            figure.savefig(partial, format="png", metadata=metadata, transparent=True)
    except OSError as error:
        raise RnnzooError(f"Cannot write {path}: {error.strerror or error}.") from None
