"""The recurrences: the equations of each kernel, its backends, and the architectures that run on it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from rnnzoo.kernels import dispatch
from rnnzoo.zoo.core.registry import architectures, mixer_class

from .text import prose

__all__ = ["api", "folders", "sections"]


def folders() -> list[str]:
    """Names of the folders of kernels/ that hold an operation."""
    root = Path(dispatch.__file__).resolve().parent
    return sorted(file.parent.name for file in root.glob("*/__init__.py"))


def sections() -> str:
    """A section for every recurrence."""
    parts = []
    for name in folders():
        module = importlib.import_module(f"rnnzoo.kernels.{name}")
        users = [own for own in architectures() if mixer_class(own).kernel == name]
        parts.append(f"### {name}\n\n{prose(module.__doc__ or '')}")
        parts.append(_backends(module))
        if users:
            parts.append("Architectures: " + ", ".join(f"[{own}](zoo/{own}.md)" for own in users) + ".")
    return "\n\n".join(parts) + "\n"


def _backends(module: ModuleType) -> str:
    """Operations that a kernel registers, each with its backends, fastest first."""
    lines = []
    for operation in module.__all__:
        try:
            found = dispatch.backends(operation)
        except KeyError:
            continue  # a class or a helper, no operation
        lines.append(f"- `{operation}`: " + ", ".join(f"`{status.backend}`" for status in found))
    return "\n".join(lines)


def api() -> str:
    """The public functions of every recurrence, for mkdocstrings."""
    return "\n\n".join(
        f"::: rnnzoo.kernels.{name}\n    options:\n      show_root_toc_entry: true" for name in folders()
    )
