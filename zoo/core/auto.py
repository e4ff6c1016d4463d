"""The zoo's model types in transformers' Auto classes, without importing transformers or torch before somebody does.

transformers keeps types that others add in plain dictionaries. Ours are put in place when its own Auto modules are
imported (or at once, if they are already), and import an architecture only when it is asked for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from .folders import architecture_module, architectures
from .registry import config_class

__all__ = ["register_auto_classes"]

PREFIX = "rnnzoo-"
AUTO = "transformers.models.auto"
SUFFIXES = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"} | {
    "AutoModelForSequenceClassification": "ForSequenceClassification"
}


def register_auto_classes() -> None:
    """Makes every architecture known to transformers' Auto classes, under its own prefixed model_type."""
    for name, fill in ((f"{AUTO}.configuration_auto", _fill_configs), (f"{AUTO}.modeling_auto", _fill_models)):
        if name in sys.modules and not _being_imported(sys.modules[name]):
            fill(sys.modules[name])
        elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, fill))


def _being_imported(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _fill_configs(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _Configs):
        mapping._extra_content = _Configs(mapping._extra_content)


def _fill_models(module: ModuleType) -> None:
    for name, suffix in SUFFIXES.items():
        mapping = getattr(module, name)._model_mapping
        if not isinstance(mapping._extra_content, _Models):
            mapping._extra_content = _Models(mapping._extra_content, suffix)


class _Configs(dict):
    """model_type -> configuration class; ours are imported when they are read."""

    def __init__(self, others: dict[str, Any]):
        super().__init__({PREFIX + name: None for name in architectures()} | others)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return config_class(key.removeprefix(PREFIX)) if value is None else value

    def values(self) -> list[Any]:  # type: ignore[override]
        return [self[key] for key in self]

    def items(self) -> list[tuple[str, Any]]:  # type: ignore[override]
        return [(key, self[key]) for key in self]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self.items()),)


class _Models(dict):
    """Configuration class -> model class; ours are found by the name of the configuration's."""

    def __init__(self, others: dict[type, Any], suffix: str):
        super().__init__(others)
        self.suffix = suffix

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or _architecture(key) is not None

    def __missing__(self, key: type) -> Any:
        name = _architecture(key)
        if name is None:
            raise KeyError(key)
        module = architecture_module(name, "modeling")
        return getattr(module, key.__name__.removesuffix("Config") + self.suffix)

    def __iter__(self) -> Iterator[type]:
        yield from super().__iter__()
        for name in architectures():
            own = config_class(name)
            if own is not None and not super().__contains__(own):
                yield own

    def __len__(self) -> int:
        return len(list(iter(self)))

    def keys(self) -> list[type]:  # type: ignore[override]
        return list(self)

    def values(self) -> list[Any]:  # type: ignore[override]
        return [self[key] for key in self]

    def items(self) -> list[tuple[type, Any]]:  # type: ignore[override]
        return [(key, self[key]) for key in self]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self.items()),)


def _architecture(key: object) -> str | None:
    """The architecture whose configuration class this is."""
    if not isinstance(key, type):
        return None
    name = str(getattr(key, "model_type", "")).removeprefix(PREFIX)
    return name if name in architectures() and config_class(name) is key else None


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `then` with a module as soon as it has been imported, once."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, run, then = spec.loader, spec.loader.exec_module, self.then

        def exec_module(module: ModuleType) -> None:
            run(module)
            then(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
