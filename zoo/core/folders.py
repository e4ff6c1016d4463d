"""The architectures that are here, and their modules by name.

Published models bring this module along written anew, with the architectures that came with them.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

__all__ = ["architecture_module", "architectures"]


@functools.cache
def architectures() -> tuple[str, ...]:
    """Names of the architecture folders of the zoo, sorted."""
    zoo = Path(__file__).resolve().parent.parent
    return tuple(sorted(p.parent.name for p in zoo.glob("*/modeling_*.py") if p.stem == f"modeling_{p.parent.name}"))


def architecture_module(name: str, what: str) -> ModuleType:
    """`zoo/<name>/<what>_<name>.py`, imported now if need be; `what` is "configuration", "modeling" or "importing"."""
    return importlib.import_module(f"...{name}.{what}_{name}", __name__)
