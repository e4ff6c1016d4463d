"""The models: one generic decoder in `core`, and one folder per architecture."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .core.registry import architectures
from .core.transformers_changes import register_auto_classes

__all__ = [
    "RecurrentCache",
    "architectures",
    "export_checkpoint",
    "import_checkpoint",
    "importable",
    "register_auto_classes",
    "replaying",
]

if TYPE_CHECKING:
    from .core.cache import RecurrentCache
    from .core.decoding import replaying
    from .core.importing import export_checkpoint, import_checkpoint, importable

# Looked up when first used, so that listing the architectures imports no torch.
LAZY = {"RecurrentCache": "cache", "replaying": "decoding"} | dict.fromkeys(
    ("export_checkpoint", "import_checkpoint", "importable"), "importing"
)


def __getattr__(name: str):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".core.{LAZY[name]}", __name__), name)
