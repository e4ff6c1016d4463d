"""Configuration of RWKV-7."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig
from ..core.rwkv_heads import HeadedConfig


def _size(layers: int, width: int, **ranks: int) -> dict:
    return {"vocab_size": 65536, "num_hidden_layers": layers, "hidden_size": width, "head_dim": 64} | ranks


def _rank(width: int, factor: float, power: float) -> int:
    """The authors' suggestion: factor * width^power in steps of 32."""
    return max(32, round(factor * width**power / 32) * 32)


@strict
class RWKV7Config(HeadedConfig):
    """`HeadedConfig`, and the ranks of what depends on the data; None for what the authors suggest for the width.

    Args:
        rwkv7_decay_rank: of the decay. rwkv7_rate_rank: of the in-context learning rate. rwkv7_gate_rank: of the gate.
        rwkv7_value_rank: of the value residual's share.
        rwkv7_value_residual: mix the first layer's values into those of the others (not in students of attention).
    """

    model_type = "rnnzoo-rwkv7"
    mixer = "rwkv7"
    sizes = {
        "0.19B": _size(12, 768),
        "0.4B": _size(24, 1024, rwkv7_gate_rank=128),
        "1.5B": _size(24, 2048),
        "2.9B": _size(32, 2560),
    }

    channel_mixer: str = "rwkv7"
    rwkv7_decay_rank: int | None = None
    rwkv7_rate_rank: int | None = None
    rwkv7_value_rank: int | None = None
    rwkv7_gate_rank: int | None = None
    rwkv7_value_residual: bool = True

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        for name, factor, power in (("decay", 1.8, 0.5), ("rate", 1.8, 0.5), ("value", 1.3, 0.5), ("gate", 0.6, 0.8)):
            if getattr(config, f"rwkv7_{name}_rank") is None:
                setattr(config, f"rwkv7_{name}_rank", _rank(config.hidden_size, factor, power))

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """The changes of RADLADS, which keep the teacher's own blocks around the mixer."""
        block = {"channel_mixer": "mlp", "embedding_norm": False}
        return block | {"rwkv_group_norm": False, "rwkv_rotate": True, "rwkv7_value_residual": False}
