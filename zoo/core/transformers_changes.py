"""Everything that rnnzoo changes in transformers, made when transformers imports the module in question.

- `CONFIG_MAPPING` and the Auto classes know the zoo's model types: their dictionaries of others' types have them, and
  import an architecture only when it is asked for.
- The list of layer types that transformers' base configuration accepts has the zoo's: `Trainer`, PEFT and tokenizers
  read a checkpoint's `config.json` with the base class.

Importing these modules takes seconds and loads torch, `import rnnzoo` takes 0.05 s. So rnnzoo does not import them: a
finder at the head of `sys.meta_path` has them changed as soon as they have run, and stays there, for they may be asked
for without being imported (`importlib.util.find_spec`), and imported again (`importlib.reload`).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from .folders import architecture_module, architectures
from .registry import config_class, has_mixer

__all__ = ["allow_layer_types", "register_auto_classes"]

PREFIX = "rnnzoo-"
SUFFIXES = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"} | {
    "AutoModelForSequenceClassification": "ForSequenceClassification"
}


def register_auto_classes() -> None:
    """Makes every architecture known to transformers' Auto classes, under its own prefixed model_type."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in CHANGES:
        if name in sys.modules:
            importlib.import_module(name)  # waits for a thread that is at it
    _change_what_is_there()


def allow_layer_types(module: ModuleType) -> None:
    """Lets `transformers.configuration_utils` accept the zoo's layer types."""
    allowed = module.ALLOWED_ATTN_LAYER_TYPES
    if not isinstance(allowed, _LayerTypes):
        module.ALLOWED_ATTN_LAYER_TYPES = _LayerTypes(allowed)


def _fill_configs(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _Configs):
        mapping._extra_content = _Configs(mapping._extra_content)


def _fill_models(module: ModuleType) -> None:
    for name, suffix in SUFFIXES.items():
        mapping = getattr(module, name)._model_mapping
        if not isinstance(mapping._extra_content, _Models):
            mapping._extra_content = _Models(mapping._extra_content, suffix)


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.configuration_utils": allow_layer_types,
    "transformers.models.auto.configuration_auto": _fill_configs,
    "transformers.models.auto.modeling_auto": _fill_models,
}


class _LayerTypes(tuple):
    """Layer types of transformers, and any that the zoo has a mixer for.

    `others` may be such a tuple of another version of the zoo, which a published model has brought along.
    """

    def __new__(cls, others: tuple[str, ...]) -> _LayerTypes:
        self = super().__new__(cls, others)
        self.others = others
        return self

    def __contains__(self, key: object) -> bool:
        return key in self.others or (isinstance(key, str) and has_mixer(key))


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


_changed: dict[str, ModuleType] = {}


def _change(name: str, module: ModuleType) -> None:
    CHANGES[name](module)
    _changed[name] = module


def _change_what_is_there() -> None:
    """What was imported before, or was found by somebody else's finder."""
    for name in CHANGES:
        module = sys.modules.get(name)
        being_imported = getattr(getattr(module, "__spec__", None), "_initializing", False)
        if module is not None and _changed.get(name) is not module and not being_imported:
            _change(name, module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `CHANGES` as the finders after it do, with a loader that changes them."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        _change_what_is_there()
        if fullname not in CHANGES or self not in sys.meta_path:
            return None
        finders = [f for f in sys.meta_path[sys.meta_path.index(self) + 1 :] if hasattr(f, "find_spec")]
        specs = (finder.find_spec(fullname, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads as `loader` does, which the module then is said to come from, and changes it."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        _change(module.__name__, module)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.loader, name)
