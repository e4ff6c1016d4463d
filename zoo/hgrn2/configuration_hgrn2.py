"""Configuration of HGRN2."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig
from ..core.head_sizes import derive_heads


@strict
class HGRN2Config(RecurrentConfig):
    """`RecurrentConfig`, and the sizes of the expanded state.

    Args:
        hgrn2_key_dim: channels of a head's gate, its key and its query, the expansion ratio of the paper; None: the
            largest proper divisor of hidden_size up to 128, or with `hgrn2_num_heads` its share of hidden_size.
        hgrn2_num_heads: None for hidden_size / hgrn2_key_dim.
        hgrn2_value_dim: input channels of a head; None for hidden_size / hgrn2_num_heads.
        hgrn2_kv_heads: heads with a gate, an input and a state, each read by a group of query heads (students of
            grouped-query attention); None for `hgrn2_num_heads`.
        hgrn2_lower_bounds: learn bounds of the forget gates that rise over the layers.
    """

    model_type = "rnnzoo-hgrn2"
    mixer = "hgrn2"
    # The size trained on 100B tokens by the authors of flash-linear-attention.
    sizes = {
        "1.3B": {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632}
        | {"hgrn2_key_dim": 128, "rms_norm_eps": 1e-6}
    }

    hgrn2_key_dim: int | None = None
    hgrn2_num_heads: int | None = None
    hgrn2_value_dim: int | None = None
    hgrn2_kv_heads: int | None = None
    hgrn2_lower_bounds: bool = True

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        derive_heads(config, "hgrn2")
        if config.hgrn2_kv_heads is None:
            config.hgrn2_kv_heads = config.hgrn2_num_heads
        if config.hgrn2_num_heads % config.hgrn2_kv_heads:
            raise ValueError(
                f"hgrn2_num_heads ({config.hgrn2_num_heads}) must be a multiple of hgrn2_kv_heads "
                f"({config.hgrn2_kv_heads})."
            )

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """One state of head_dim x head_dim per kv head."""
        heads = {"hgrn2_num_heads": num_heads, "hgrn2_kv_heads": num_kv_heads}
        return heads | {"hgrn2_key_dim": head_dim, "hgrn2_value_dim": head_dim}
