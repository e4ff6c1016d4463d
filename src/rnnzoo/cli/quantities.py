"""Option values with units, and numbers as people read them."""

from __future__ import annotations

import re
from typing import Any

import click

__all__ = ["BYTES", "COUNT", "COUNT_OR_NONE", "format_bytes", "format_count", "format_seconds"]

_BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class _Quantity(click.ParamType[int]):
    """A number with a unit: `1.5MB`, `500k`; `least` at least."""

    def __init__(self, name: str, units: dict[str, int], example: str, least: int = 1) -> None:
        self.least = least
        self.name = name
        self.units = units
        self.example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", value)
        unit = self.units.get(match[2].lower()) if match else None
        if match is None or unit is None or (number := round(float(match[1]) * unit)) < self.least:
            self.fail(f"{value!r} is no {self.name}; write it like {self.example}.", param, ctx)
        return number


BYTES = _Quantity("size", _BYTE_UNITS, "4MB, 1.5MB or 512KiB")
COUNT = _Quantity("number", _COUNT_UNITS, "500000, 500k or 0.5M")
COUNT_OR_NONE = _Quantity("number", _COUNT_UNITS, "0, 500000, 500k or 0.5M", least=0)


def format_bytes(count: float) -> str:
    """`1474560` -> `1.47 MB` (powers of ten, as in --state-budget)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """`134515008` -> `135M`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def format_seconds(seconds: float) -> str:
    """`3725` -> `1 h 2 min`; of less than 10 s two digits, such as `0.034 s`."""
    if 0 < seconds < 9.95:
        return f"{seconds:.2g} s" if seconds >= 0.001 else "under 0.001 s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
