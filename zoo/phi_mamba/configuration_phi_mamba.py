"""Configuration of Phi-Mamba's discrete Mamba-2."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class PhiMambaConfig(RecurrentConfig):
    """`RecurrentConfig`, whose `num_attention_heads` of `head_dim` channels are those of x, and the sizes of the state.

    Args:
        phi_mamba_state_size: channels of a head of B and C; None: `head_dim`.
        ssm_conv_kernel: taps of the convolution. ssm_conv_bias: its bias.
    """

    model_type = "rnnzoo-phi_mamba"
    mixer = "phi_mamba"
    sizes = {
        "1.5B": {"vocab_size": 51200, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32}
        | {"intermediate_size": 8192, "mlp_type": "plain", "mlp_bias": True, "hidden_act": "gelu_new"}
        | {"norm_type": "layer", "parallel_residual": True}
    }

    phi_mamba_state_size: int | None = None
    ssm_conv_kernel: int = 4
    ssm_conv_bias: bool = True

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.phi_mamba_state_size is None:
            config.phi_mamba_state_size = config.head_dim
        for name in ("phi_mamba_state_size", "ssm_conv_kernel"):
            if getattr(config, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(config, name)}.")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """B and C as wide as an attention layer's heads."""
        return {"phi_mamba_state_size": head_dim}
