"""Configuration of RWKV-4."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig
from ..core.rwkv import RWKVConfig


def _size(layers: int, width: int) -> dict:
    return {"vocab_size": 50277, "num_hidden_layers": layers, "hidden_size": width}


@strict
class RWKV4Config(RWKVConfig):
    """`RWKVConfig`, and the width of time mixing.

    Args:
        rwkv4_width: channels of time mixing; None for `hidden_size`.
        temporal_perspectives: residual streams through the same layers that differ in their token shifts (Dumitru et
            al. 2024); 1 is RWKV-4.
    """

    model_type = "rnnzoo-rwkv4"
    mixer = "rwkv4"
    sizes = {
        "169M": _size(12, 768),
        "430M": _size(24, 1024),
        "1.5B": _size(24, 2048),
        "3B": _size(32, 2560),
        "7B": _size(32, 4096),
        "14B": _size(40, 5120),
    }

    channel_mixer: str = "rwkv4"
    rwkv4_width: int | None = None
    temporal_perspectives: int = 1

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.rwkv4_width is None:
            config.rwkv4_width = config.hidden_size
        if config.temporal_perspectives < 1:
            raise ValueError(f"temporal_perspectives is {config.temporal_perspectives}, but there must be one or more.")
        if config.temporal_perspectives > 1 and set(config.layer_types) != {"rwkv4"}:
            raise ValueError("temporal_perspectives need RWKV-4 in every layer, but layer_types has other mixers.")
