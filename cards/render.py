"""README.md of an output folder, rendered from its results.json and from nothing else."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import jinja2

from ..kernels.errors import RnnzooError
from .limits import limits
from .metadata import front_matter
from .validate import validate_card
from .view import NOT_MEASURED, View, cell, count, duration, size

__all__ = ["PLOTS", "render_card", "render_text"]

PLOTS = {
    "plots/perplexity_by_position.png": "Perplexity by position in one long text",
    "plots/recall_by_distance.png": "Recall by distance",
    "plots/state_bytes.png": "State bytes by context",
    "plots/decode_speed.png": "Decoding speed by context",
}


def render_text(results: dict, plots: tuple[str, ...] = ()) -> str:
    """The card of `results` (results.json as read); `plots` are those of PLOTS that exist beside it."""
    view = View(results, plots)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown; cells go through `cell`
    )
    environment.filters |= {"cell": cell, "size": size, "count": count, "duration": duration}
    text = environment.get_template("trained.md.j2" if view.training else "card.md.j2").render(
        view=view, front_matter=front_matter(view), limits=limits(view), not_measured=NOT_MEASURED, plot_titles=PLOTS
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def render_card(folder: str | Path) -> Path:
    """Writes README.md into `folder` from its results.json; the same results give the same file.

    Returns:
        The path of the card.
    Raises:
        RnnzooError: results.json is missing or broken, the card would not be valid, or the folder cannot be written.
    """
    folder = Path(folder)
    source = folder / "results.json"
    try:
        results = json.loads(source.read_text())
    except FileNotFoundError:
        raise RnnzooError(f"{folder} holds no results.json: run rnnzoo convert or rnnzoo eval first.") from None
    except (OSError, ValueError) as error:
        raise RnnzooError(f"{source} is not readable ({error}): run rnnzoo eval again.") from None
    if not isinstance(results, dict) or results.get("schema") != 1:
        raise RnnzooError(
            f"{source} does not have schema 1: it was written by another version of rnnzoo; run rnnzoo eval again."
        )
    text = render_text(results, tuple(name for name in PLOTS if (folder / name).exists()))
    problems = validate_card(text, folder)
    if problems:
        raise RnnzooError(f"The card of {folder} would not be valid: {problems[0]}")
    card = folder / "README.md"
    _write(card, text)
    return card


def _write(path: Path, text: str) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".README.", delete=False) as file:
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
