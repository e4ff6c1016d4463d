"""The part of a card that people write: between two marks, it stays as it is when the card is rendered again."""

from __future__ import annotations

import re
from pathlib import Path

from ..kernels.errors import RnnzooError

__all__ = ["BEGIN", "END", "RENDERED", "kept_notes", "without_notes"]

BEGIN = "<!-- begin: hand-written -->"
END = "<!-- end: hand-written -->"
RENDERED = "<!-- Rendered by rnnzoo"
_ANY_MARK = re.compile(r"^.*<!--\s*(?:begin|end)\W*hand.?written.*$", re.MULTILINE | re.IGNORECASE)
_WHOLE = re.compile(rf"^{re.escape(BEGIN)}[ \t]*\n(.*?)^{re.escape(END)}[ \t]*$", re.MULTILINE | re.DOTALL)


def kept_notes(card: Path, replace: bool = False) -> str:
    """The lines between the marks of an existing card, with their line ends; "" where there is no card yet.

    Args:
        replace: a card that rnnzoo did not write may be replaced.
    Raises:
        RnnzooError: the marks are damaged, or somebody else wrote the file; nothing has been written then.
    """
    try:
        text = card.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise RnnzooError(f"{card} is not readable as text ({error}): move it away and render again.") from None
    text = text.replace("\r\n", "\n")
    marks = [found.group().strip() for found in _ANY_MARK.finditer(text)]
    if marks and marks != [BEGIN, END]:
        raise RnnzooError(
            f"The marks of the hand-written section in {card} are damaged (found {', '.join(marks)}): it must hold the "
            f"line {BEGIN} once and after it the line {END} once; put them right, or move the file away. "
            "Nothing was written."
        )
    if marks:
        found = _WHOLE.search(text)
        if found is None:
            raise RnnzooError(
                f"The marks of the hand-written section in {card} are damaged: {BEGIN} and {END} must each stand alone "
                "on a line; put them right, or move the file away. Nothing was written."
            )
        return found[1]
    if text.strip() and RENDERED not in text and not replace:
        raise RnnzooError(
            f"{card} was not written by rnnzoo and would be lost: move it away, put its text between the lines {BEGIN} "
            f"and {END}, or allow it with --replace. Nothing was written."
        )
    return ""


def without_notes(text: str) -> str:
    """A card without what people wrote, for checks of what was rendered."""
    return _WHOLE.sub("", text)
