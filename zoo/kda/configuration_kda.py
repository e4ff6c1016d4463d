"""Configuration of Kimi Delta Attention."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig
from ..core.head_sizes import delta_student, derive_delta


@strict
class KDAConfig(RecurrentConfig):
    """`RecurrentConfig`, and the sizes of the states.

    Layers of type "kda.attention" are the latent softmax attention without rotation that Kimi Linear has beside it:
    `num_attention_heads`, and the fields that begin with "mla".

    Args:
        kda_key_dim: channels of a query and a key; None: the largest proper divisor of hidden_size up to 128, or with
            `kda_num_heads` its share of hidden_size.
        kda_num_heads: heads of queries; None for hidden_size / kda_key_dim.
        kda_value_dim: None for hidden_size / kda_num_heads.
        kda_k_heads, kda_v_heads: heads of keys and values; None for `kda_num_heads`. There is a state for each head of
            values.
        kda_conv_kernel: taps of the convolutions of q, k and v.
        kda_conv_activation: after them: "silu" or "none".
        kda_rank: width between the two matrices of the decay and of the gate; None for `kda_value_dim`.
        kda_gate_bias: a bias in the gate's second matrix.
        kda_negative_eigenvalues: beta in (0, 2) rather than (0, 1).
        mla_rank: channels that a token leaves in the cache for keys and values; None for 4 heads' width.
        mla_shared_dim: further channels that all heads' keys share; None for half a head's width.
        mla_key_dim, mla_value_dim: channels of a head that are made from those in the cache; None for `head_dim`.
    """

    model_type = "rnnzoo-kda"
    mixer = "kda"
    # The configuration of flash-linear-attention; the paper's models are mixtures of experts.
    sizes = {
        "1.3B": {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632}
        | {"kda_num_heads": 16, "kda_gate_bias": True, "rms_norm_eps": 1e-6}
    }

    kda_key_dim: int | None = None
    kda_num_heads: int | None = None
    kda_value_dim: int | None = None
    kda_k_heads: int | None = None
    kda_v_heads: int | None = None
    kda_conv_kernel: int = 4
    kda_conv_activation: str = "silu"
    kda_rank: int | None = None
    kda_gate_bias: bool = False
    kda_negative_eigenvalues: bool = False
    mla_rank: int | None = None
    mla_shared_dim: int | None = None
    mla_key_dim: int | None = None
    mla_value_dim: int | None = None

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        derive_delta(config, "kda")
        width = config.head_dim
        derived = {"kda_rank": config.kda_value_dim, "mla_rank": 4 * width, "mla_shared_dim": width // 2}
        for name, value in (derived | {"mla_key_dim": width, "mla_value_dim": width}).items():
            if getattr(config, name) is None:
                setattr(config, name, value)

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """One state per kv head; no activation after the convolutions."""
        return delta_student("kda", num_heads, num_kv_heads, head_dim)
