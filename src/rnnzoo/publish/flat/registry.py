"""The mixers and configurations of this file, by layer type. Stands for `zoo/core/registry.py`, and imports nothing."""

from __future__ import annotations

from ...kernels.errors import RnnzooError
from ...zoo.core.configuration import RecurrentConfig
from ...zoo.core.mixer import Mixer

MIXERS: dict[str, type[Mixer]] = {}
CHANNEL_MIXERS: dict[str, type[Mixer]] = {}
CONFIGS: dict[str, type[RecurrentConfig]] = {}


def register_mixer(name: str):
    """Class decorator: makes a `Mixer` available as layer type `name`."""

    def register(cls):
        cls.layer_type = name
        MIXERS[name] = cls
        return cls

    return register


def register_channel_mixer(name: str):
    """Class decorator: makes a `Mixer` available as `config.channel_mixer` `name`."""

    def register(cls):
        CHANNEL_MIXERS[name] = cls
        return cls

    return register


def known_mixers() -> tuple[str, ...]:
    return tuple(sorted(MIXERS))


def has_mixer(name: str) -> bool:
    return name in MIXERS


def mixer_class(name: str) -> type[Mixer]:
    if name not in MIXERS:
        raise RnnzooError(f"'{name}' is not a layer type of this file, which has {', '.join(MIXERS)}.")
    return MIXERS[name]


def channel_mixer_class(name: str) -> type[Mixer]:
    if name not in CHANNEL_MIXERS:
        raise RnnzooError(f"'{name}' is not a channel mixer of this file, which has mlp {' '.join(CHANNEL_MIXERS)}.")
    return CHANNEL_MIXERS[name]


def config_class(name: str) -> type[RecurrentConfig] | None:
    return CONFIGS.get(name.partition(".")[0])
