"""Configuration of JRT-RNN."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..based.configuration_based import BasedConfig, published


@strict
class JRTConfig(BasedConfig):
    """`BasedConfig`: the encoder has the sizes of the layer that it is in."""

    model_type = "rnnzoo-jrt"
    mixer = "jrt"
    # HazyResearch/prefix-linear-attention; trained with the first 1024 of 2048 tokens as the prefix.
    sizes = {
        "360M": published("jrt", 1024, 26, (1, 6, 11, 16, 21)),
        "1.3B": published("jrt", 1792, 36, (1, 6, 11, 16, 21, 27, 33)),
    }
