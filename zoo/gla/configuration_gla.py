"""Configuration of gated linear attention."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class GLAConfig(RecurrentConfig):
    """`RecurrentConfig`, where `head_dim` is the width of a value head, and the sizes of keys and gates.

    Args:
        gla_key_width: channels of a head of q and k; None: half of `head_dim`.
        gla_gate_rank: inner width of the forget gates' projection.
        gla_gate_divisor: tau, by which the gates' logarithm is divided, so that they start near 1.
    """

    model_type = "rnnzoo-gla"
    mixer = "gla"
    # Section 5 of the paper: four heads at both sizes.
    sizes = {
        "340M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 4},
        "1.3B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 4},
    }

    rms_norm_eps: float = 1e-6
    gla_key_width: int | None = None
    gla_gate_rank: int = 16
    gla_gate_divisor: float = 16.0

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.gla_key_width is None:
            config.gla_key_width = max(1, config.head_dim // 2)
        for name in ("gla_key_width", "gla_gate_rank", "gla_gate_divisor"):
            if getattr(config, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(config, name)}.")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """Keys as wide as an attention layer's."""
        return {"gla_key_width": head_dim}
