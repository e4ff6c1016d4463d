"""Configuration of JRT-RNN."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..based.configuration_based import BasedConfig

__all__ = ["JRTConfig"]


@strict
class JRTConfig(BasedConfig):
    """`BasedConfig`: the encoder has the sizes of the layer that it is in."""

    model_type = "rnnzoo-jrt"
    mixer = "jrt"
