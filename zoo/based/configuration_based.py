"""Configuration of Based."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig

__all__ = ["BasedConfig"]


@strict
class BasedConfig(RecurrentConfig):
    """`RecurrentConfig`, and the width of queries and keys, whose square is the size of the state.

    The paper's models mix three kinds of layers, of which linear attention and windows of exact attention have a memory
    for content: `layer_types` of "based" and "sliding_attention", with a `sliding_window` of 64.

    Args:
        based_feature_dim: d', channels of a head of q and k; the feature map makes 1 + d' + d' (d' + 1) / 2 of them.
    """

    model_type = "rnnzoo-based"
    mixer = "based"

    based_feature_dim: int = 16

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.based_feature_dim < 1:
            raise ValueError(f"based_feature_dim must be at least 1, got {config.based_feature_dim}.")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """Keys as wide as an attention layer's. The state then has head_dim^2 / 2 rows for each head."""
        return {"based_feature_dim": head_dim}
