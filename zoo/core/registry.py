"""Which mixers exist. An architecture is a folder of the zoo: `zoo/<name>/{configuration,modeling}_<name>.py`.

Nothing is listed by hand: a folder with a `modeling_<name>.py` is an architecture, its mixer registers itself under
`<name>` when the file is imported, and its configuration class registers itself when it is defined. Mixers derive from
`mixer.Mixer` and configurations from `configuration.RecurrentConfig`; this module, which both import, knows neither.
"""

from __future__ import annotations

from typing import Any, TypeVar

from ...kernels.errors import RnnzooError
from .folders import architecture_module, architectures

__all__ = [
    "ATTENTION_TYPES",
    "CHANNEL_MIXERS",
    "MIXERS",
    "architectures",
    "channel_mixer_class",
    "config_class",
    "has_mixer",
    "known_mixers",
    "mixer_class",
    "register_channel_mixer",
    "register_mixer",
]

ATTENTION_TYPES = ("full_attention", "sliding_attention")
"""Layer types that the core itself provides, for hybrids."""

MIXERS: dict[str, type[Any]] = {}
"""Mixers imported so far, by layer type. Use `mixer_class`, which imports on demand."""

CHANNEL_MIXERS: dict[str, type[Any]] = {}
"""Channel mixers with a state imported so far, by the architecture that has them. Use `channel_mixer_class`."""

CONFIGS: dict[str, type[Any]] = {}
"""Configuration classes imported so far, by the name of their mixer. Use `config_class`, which imports on demand."""

M = TypeVar("M", bound=type[Any])


def register_mixer(name: str):
    """Class decorator: makes a `Mixer` available as layer type `name`.

    Args:
        name: that of its architecture; of a further mixer, for its hybrids: `<architecture>.<mixer>`.
    """

    def register(cls: M) -> M:
        cls.layer_type = name
        MIXERS[name] = cls
        return cls

    return register


def register_channel_mixer(name: str):
    """Class decorator: makes a `Mixer` available as `config.channel_mixer` `name`, that of its architecture."""

    def register(cls: M) -> M:
        CHANNEL_MIXERS[name] = cls
        return cls

    return register


def known_mixers() -> tuple[str, ...]:
    """Every name that may stand in `config.layer_types`, sorted."""
    return tuple(sorted({*ATTENTION_TYPES, *architectures(), *MIXERS}))


def has_mixer(name: str) -> bool:
    """Whether `name` may stand in `config.layer_types`."""
    if "." in name:
        _import(name, "modeling")
    return name in known_mixers()


def _import(name: str, what: str) -> None:
    folder = name.partition(".")[0]
    if folder in architectures():
        architecture_module(folder, what)


def mixer_class(name: str) -> type[Any]:
    """The mixer of a layer type, imported now if need be.

    Raises:
        RnnzooError: no mixer of that name.
    """
    if name not in MIXERS:
        _import(name, "modeling")
    if name not in MIXERS:
        raise RnnzooError(f"'{name}' is not a layer type; known are {', '.join(known_mixers())}.")
    return MIXERS[name]


def channel_mixer_class(name: str) -> type[Any]:
    """The channel mixer of an architecture, imported now if need be.

    Raises:
        RnnzooError: no channel mixer of that name.
    """
    if name not in CHANNEL_MIXERS:
        _import(name, "modeling")
    if name not in CHANNEL_MIXERS:
        raise RnnzooError(
            f"'{name}' has no channel mixer of its own; channel_mixer is 'mlp' or an architecture's name."
        )
    return CHANNEL_MIXERS[name]


def config_class(name: str) -> type[Any] | None:
    """The configuration class that declares a mixer's own fields; None for the core's attention layers."""
    name = name.partition(".")[0]
    if name not in CONFIGS:
        _import(name, "configuration")
    return CONFIGS.get(name)
