"""README.md of an output folder, from its results.json; config.json tells only whether modelling code is there."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jinja2

from ..kernels.errors import RnnzooError
from . import commands
from .chain import licence_chain, licence_words
from .citations import citations
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
    """results.json of an output folder.

    Raises:
        RnnzooError: it is missing, broken, or of another version.
    """
    source = folder / "results.json"
    try:
        results = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RnnzooError(f"{folder} holds no results.json: run rnnzoo convert or rnnzoo eval first.") from None
    except (OSError, ValueError) as error:
        raise RnnzooError(f"{source} is not readable ({error}): run rnnzoo eval again.") from None
    if not isinstance(results, dict) or results.get("schema") != 1:
        raise RnnzooError(
            f"{source} does not have schema 1: it was written by another version of rnnzoo; run rnnzoo eval again."
        )
    return results


def render_card(folder: str | Path, *, replace: bool = False) -> Path:
    """Writes README.md into `folder` from its results.json, and the plots that are not there yet.

    The same results give the same file. The hand-written section of an earlier card stays as it is.

    Args:
        replace: a README.md that rnnzoo did not write may be replaced.
    Returns:
        The path of the card.
    Raises:
        RnnzooError: results.json is missing or broken, README.md is somebody else's or its marks are damaged, the card
            would not be valid, or the folder cannot be written. The old README.md is then as it was.
    """
    folder = Path(folder)
    results = read_results(folder)
    card = folder / "README.md"
    notes = kept_notes(card, replace)
    plots = write_plots(results, folder)
    text = render_text(results, plots, notes=notes, standalone=_holds_code(folder))
    problems = validate_card(text, folder)
    if problems:
        raise RnnzooError(f"The card of {folder} would not be valid: {problems[0]}")
    _write(card, text)
    return card


def _holds_code(folder: Path) -> bool:
    """Whether config.json names modelling code in the folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("auto_map"))


def _write(path: Path, text: str) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".README.", delete=False, encoding="utf-8", newline="\n"
        ) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        raise RnnzooError(f"Cannot write {path}: {error.strerror or error}.") from None
