"""Configuration of RWKV-6."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig
from ..core.rwkv_heads import HeadedConfig


def _size(layers: int, width: int, ranks: int = 1) -> dict:
    sizes = {"vocab_size": 65536, "num_hidden_layers": layers, "hidden_size": width, "head_dim": 64}
    return sizes | {"rwkv6_mix_rank": 32 * ranks, "rwkv6_decay_rank": 64 * ranks}


@strict
class RWKV6Config(HeadedConfig):
    """`HeadedConfig`, and the ranks of what depends on the data.

    Args:
        rwkv6_mix_rank: of each of the five token shifts. rwkv6_decay_rank: of the decay.
        rwkv6_key_width: channels of a head of r and k; None for `head_dim`.
        rwkv6_gate: "silu", or "sigmoid" (students of attention: a gate that starts at zero lets half of all through).
        rwkv6_balance: multiply keys by 1 - w, so that the state is an average (students of attention).
    """

    model_type = "rnnzoo-rwkv6"
    mixer = "rwkv6"
    sizes = {"1.6B": _size(24, 2048), "3B": _size(32, 2560), "7B": _size(32, 4096, 2), "14B": _size(61, 4096, 2)}
    channel_ratio = 3.5

    channel_mixer: str = "rwkv6"
    rwkv6_mix_rank: int = 32
    rwkv6_decay_rank: int = 64
    rwkv6_key_width: int | None = None
    rwkv6_gate: str = "silu"
    rwkv6_balance: bool = False

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.rwkv6_key_width is None:
            config.rwkv6_key_width = config.head_dim
        if config.rwkv6_gate not in ("silu", "sigmoid"):
            raise ValueError(f"rwkv6_gate must be 'silu' or 'sigmoid', got {config.rwkv6_gate!r}.")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """The changes of RADLADS, which keep the teacher's own blocks around the mixer."""
        block = {"channel_mixer": "mlp", "embedding_norm": False}
        mixer = {"rwkv_group_norm": False, "rwkv_rotate": True, "rwkv6_gate": "sigmoid", "rwkv6_balance": True}
        return block | mixer
