"""Configuration of RWKV-5."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.rwkv_heads import HeadedConfig


def _size(layers: int, width: int) -> dict:
    return {"vocab_size": 65536, "num_hidden_layers": layers, "hidden_size": width, "head_dim": 64}


@strict
class RWKV5Config(HeadedConfig):
    """Nothing beyond what the generations with matrix-valued states share. The paper's sizes have heads of 64."""

    model_type = "rnnzoo-rwkv5"
    mixer = "rwkv5"
    sizes = {"0.4B": _size(24, 1024), "1.5B": _size(24, 2048), "3B": _size(32, 2560), "7B": _size(32, 4096)}
    channel_ratio = 3.5

    channel_mixer: str = "rwkv5"
