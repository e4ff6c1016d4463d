"""Configuration of DeltaNet."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig
from ..core.head_sizes import delta_student, derive_delta


@strict
class DeltaNetConfig(RecurrentConfig):
    """`RecurrentConfig`, and the sizes of the states.

    Args:
        delta_key_dim: channels of a query and a key; None: the largest proper divisor of hidden_size up to 128, or with
            `delta_num_heads` its share of hidden_size.
        delta_num_heads: None for hidden_size / delta_key_dim.
        delta_value_dim: None for hidden_size / delta_num_heads.
        delta_k_heads, delta_v_heads: heads of keys and values; None for `delta_num_heads`. There is a state for each
            head of values.
        delta_conv_kernel: taps of the convolutions of q, k and v.
        delta_conv_activation: after them: "silu" or "none".
        delta_gate: norm(o) * silu(W_g x) rather than norm(o).
        delta_negative_eigenvalues: beta in (0, 2) rather than (0, 1).
    """

    model_type = "rnnzoo-delta_net"
    mixer = "delta_net"
    # Those of the language models of Yang et al. 2024, heads of 128 channels.
    sizes = {
        name: {"vocab_size": 32000, "hidden_size": width, "num_hidden_layers": 24, "intermediate_size": inner}
        | {"delta_num_heads": width // 128, "rms_norm_eps": 1e-6}
        for name, width, inner in (("340M", 1024, 2816), ("1.3B", 2048, 5632))
    }

    delta_key_dim: int | None = None
    delta_num_heads: int | None = None
    delta_value_dim: int | None = None
    delta_k_heads: int | None = None
    delta_v_heads: int | None = None
    delta_conv_kernel: int = 4
    delta_conv_activation: str = "silu"
    delta_gate: bool = False
    delta_negative_eigenvalues: bool = False

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        derive_delta(config, "delta")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """One state per kv head; no activation after the convolutions."""
        return delta_student("delta", num_heads, num_kv_heads, head_dim)
