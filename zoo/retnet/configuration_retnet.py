"""Configuration of RetNet."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig

# Table 1 and section 2.4 of the paper: plain MLPs of twice the width, heads of 256 channels.
PAPER = {"mlp_type": "plain", "hidden_act": "gelu", "norm_type": "layer", "head_dim": 256}


@strict
class RetNetConfig(RecurrentConfig):
    """`RecurrentConfig` with an MLP of half the usual size, since retention takes 8 D^2 parameters and not 4 D^2.

    Args:
        retnet_value_factor: width of a value head over `head_dim`, the width of a key head.
    """

    model_type = "rnnzoo-retnet"
    mixer = "retnet"
    sizes = {
        "1.3B": PAPER | {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 24},
        "2.7B": PAPER | {"hidden_size": 2560, "intermediate_size": 5120, "num_hidden_layers": 32},
        "6.7B": PAPER | {"hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 32},
    }

    rms_norm_eps: float = 1e-6
    retnet_value_factor: float = 2.0

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = -(-4 * self.hidden_size // (3 * 32)) * 32
        super().__post_init__(**kwargs)

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if round(config.retnet_value_factor * config.head_dim) < 1:
            raise ValueError(f"retnet_value_factor must be positive, got {config.retnet_value_factor}.")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """Values as wide as an attention layer's."""
        return {"retnet_value_factor": 1.0}
