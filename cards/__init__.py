"""Model cards: what a run measured, as the README.md of its output folder. Reads files only, knows no model code."""

from __future__ import annotations

from .render import render_card
from .validate import validate_card

__all__ = ["render_card", "validate_card"]
