"""Configuration of GateLoop."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class GateLoopConfig(RecurrentConfig):
    """`RecurrentConfig`, with LayerNorm and a plain MLP with GELU by default, as its author's blocks have them.

    Every channel is a head of its own; `num_attention_heads` * `head_dim` is the number of channels, and
    `num_key_value_heads` says how many groups of `head_dim` channels k and v have, repeated for the others.

    Args:
        gateloop_norm_groups: groups of the norm before the gate; None for up to 32 of 8 channels or more; 0: no norm.
    """

    model_type = "rnnzoo-gateloop"
    mixer = "gateloop"

    norm_type: str = "layer"
    mlp_type: str = "plain"
    mlp_bias: bool = True
    hidden_act: str = "gelu"
    gateloop_norm_groups: int | None = None

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        width = config.num_attention_heads * config.head_dim
        if config.gateloop_norm_groups is None:
            most = max(1, min(32, width // 8))
            config.gateloop_norm_groups = next(groups for groups in range(most, 0, -1) if width % groups == 0)
        groups = config.gateloop_norm_groups
        if groups and (width % groups or groups == width):  # the norm of one number is 0
            raise ValueError(
                f"gateloop_norm_groups ({groups}) must divide the {width} channels, num_attention_heads * head_dim, "
                "into groups of several."
            )
