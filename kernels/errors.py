"""The errors that a user sees: one sentence that says what came, what was expected and what to do."""

from __future__ import annotations

__all__ = ["RnnzooError", "ShapeError"]


class RnnzooError(Exception):
    """A mistake that the user can mend; the command line prints it on one line."""


class ShapeError(RnnzooError, ValueError):
    """A tensor argument whose shape or dtype does not fit: names the argument, its shape and the expected one."""
