"""The models: one generic decoder in `core`, and one folder per architecture."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .core.registry import architectures

__all__ = [
    "RecurrentCache",
    "architectures",
    "export_checkpoint",
    "import_checkpoint",
    "importable",
    "register_auto_classes",
]

if TYPE_CHECKING:
    from .core.cache import RecurrentCache
    from .core.importing import export_checkpoint, import_checkpoint, importable

# Looked up when first used, so that listing the architectures imports no torch.
LAZY = {"RecurrentCache": "cache"} | dict.fromkeys(
    ("export_checkpoint", "import_checkpoint", "importable"), "importing"
)


def __getattr__(name: str):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".core.{LAZY[name]}", __name__), name)


def register_auto_classes() -> None:
    """Makes every architecture known to transformers' Auto classes, under its own prefixed model_type."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from .core import modeling as core

    heads = (
        (AutoModel, core.RecurrentModel),
        (AutoModelForCausalLM, core.RecurrentForCausalLM),
        (AutoModelForSequenceClassification, core.RecurrentForSequenceClassification),
    )
    for name in architectures():
        module = importlib.import_module(f".{name}.modeling_{name}", __name__)
        own = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
        for auto, base in heads:
            for cls in own:
                if issubclass(cls, base):
                    AutoConfig.register(cls.config_class.model_type, cls.config_class, exist_ok=True)
                    auto.register(cls.config_class, cls, exist_ok=True)
