"""README.md of an output folder, from its results.json; config.json tells only whether modelling code is there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from ..kernels.errors import RnnzooError
from ..kernels.files import object_or_nothing, replace_text
from . import commands
from .chain import licence_chain, licence_words
from .citations import citations
from .describe import describe
from .formats import NOT_MEASURED, cell, count, duration, number, size
from .handwritten import kept_notes
from .limits import limits
from .metadata import front_matter
from .plots import PLOTS, write_plots
from .validate import validate_card
from .view import View

__all__ = ["PLOTS", "read_results", "render_card", "render_text"]

_NOTES = "\0notes\0"


def render_text(
    results: dict[str, Any], plots: tuple[str, ...] = (), *, notes: str = "", standalone: bool = False
) -> str:
    """The card of `results` (results.json as read).

    Args:
        plots: those of PLOTS that lie beside it and show these results. notes: the hand-written lines.
        standalone: the folder holds modelling code for use without rnnzoo.
    """
    view = View(results, plots, standalone)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown; cells go through `cell`
    )
    environment.filters |= {"cell": cell, "size": size, "count": count, "duration": duration, "number": number}
    text = environment.get_template(f"{view.kind}.md.j2").render(
        view=view,
        commands=commands,
        front_matter=front_matter(view),
        limits=limits(view),
        not_measured=NOT_MEASURED,
        plot_titles={name: title for name, (title, _) in PLOTS.items()},
        citations=citations(results, view.base_id, view.model.get("architecture")),
        licence_chain=licence_chain(view),
        licence_words=licence_words(view),
        notes=_NOTES,
    )
    rendered = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return rendered.replace(f"{_NOTES}\n", notes)  # last: it stays as it was written


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of an output folder; where there is none, but a model or an adapter, an empty one.

    Raises:
        RnnzooError: there is nothing, or it is broken, or of another version.
    """
    source = folder / "results.json"
    try:
        results = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            return {"schema": 1}
        raise RnnzooError(
            f"{folder} holds no results.json, and no model or adapter (config.json, adapter_config.json): give the "
            "folder of one."
        ) from None
    except (OSError, ValueError) as error:
        raise RnnzooError(f"{source} is not readable ({error}): run rnnzoo eval again.") from None
    if not isinstance(results, dict) or results.get("schema") != 1:
        raise RnnzooError(
            f"{source} does not have schema 1: it was written by another version of rnnzoo; run rnnzoo eval again."
        )
    return results


def render_card(
    folder: str | Path,
    *,
    replace: bool = False,
    said: dict[str, Any] | None = None,
    facts: Callable[[], dict[str, Any]] | None = None,
) -> Path:
    """Writes README.md into `folder` from its results.json, and the plots that are not there yet.

    The same results give the same file. The hand-written section of an earlier card stays as it is. Where no run has
    recorded what the model is, config.json and the headers of the weights say it.

    Args:
        replace: a README.md that rnnzoo did not write may be replaced.
        said: by the publisher (`describe.said_by_publisher`); kept in results.json.
        facts: of a model that no run has recorded, what only the model code knows of it: bytes of state.
    Returns:
        The path of the card.
    Raises:
        RnnzooError: no model, a broken results.json, a README.md that is somebody else's or has damaged marks, a card
            that would not be valid, or a folder that cannot be written. The old README.md is then as it was.
    """
    folder = Path(folder)
    results = read_results(folder)
    card = folder / "README.md"
    notes = kept_notes(card, replace)
    if said:
        results["publish"] = (results.get("publish") or {}) | said
    shown = _filled(results, folder, facts)
    plots = write_plots(shown, folder)
    standalone = bool(object_or_nothing(folder / "config.json").get("auto_map"))
    text = render_text(shown, plots, notes=notes, standalone=standalone)
    problems = validate_card(text, folder)
    if problems:
        raise RnnzooError(f"The card of {folder} would not be valid: {problems[0]}")
    if said:
        _write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    _write(card, text)
    return card


def _filled(results: dict[str, Any], folder: Path, facts: Callable[[], dict[str, Any]] | None) -> dict[str, Any]:
    """With what the files say, where no run has said what the model is."""
    if results.get("model"):
        return results
    found = describe(folder)
    if "adapter" not in found and found and facts:
        found["model"] |= facts()
    return results | found


def _write(path: Path, text: str) -> None:
    try:
        replace_text(path, text)
    except OSError as error:
        raise RnnzooError(f"Cannot write {path}: {error.strerror or error}.") from None
