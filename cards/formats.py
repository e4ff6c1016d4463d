"""Numbers and texts as a card shows them; None is "not measured"."""

from __future__ import annotations

from typing import Any

__all__ = ["NOT_MEASURED", "cell", "count", "duration", "listed", "number", "percent", "size", "tokens", "with_error"]

NOT_MEASURED = "not measured"


def number(value: Any, digits: int = 2) -> str:
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}"


def count(value: Any) -> str:
    return NOT_MEASURED if value is None else f"{value:,}"


def with_error(value: Any, stderr: Any, digits: int = 2) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:,.{digits}f}" + ("" if stderr is None else f" ± {stderr:,.{digits}f}")


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def size(value: Any) -> str:
    """Bytes in decimal units, as `--state-budget 4MB` takes them."""
    if value is None:
        return NOT_MEASURED
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:,.2f} {unit}"
    return f"{value} bytes"


def duration(seconds: Any) -> str:
    if seconds is None:
        return NOT_MEASURED
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def tokens(value: Any) -> str:
    """1024 -> 1k, 2500 -> 2,500."""
    return NOT_MEASURED if value is None else f"{value // 1024}k" if value and value % 1024 == 0 else f"{value:,}"


def cell(text: Any) -> str:
    """Text that cannot break a table or a line."""
    if text in (None, ""):
        return NOT_MEASURED
    shown = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return " ".join(shown.replace("|", "\\|").split())


def listed(words: list[str]) -> str:
    """a; a and b; a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
