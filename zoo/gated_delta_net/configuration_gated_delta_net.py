"""Configuration of Gated DeltaNet."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig
from ..core.head_sizes import delta_student, derive_delta


@strict
class GatedDeltaNetConfig(RecurrentConfig):
    """`RecurrentConfig`, and the sizes of the states.

    Layers of type "gated_delta_net.attention" are the gated softmax attention that Qwen3-Next has beside it: heads,
    rotation and biases of `RecurrentConfig`, norms of q and k of its `norm_type`, outputs times sigmoid(W_g x).

    Args:
        gdn_num_heads: heads of queries; None for heads of 256 channels that fill 3/4 of hidden_size, two at
            least.
        gdn_key_dim: channels of a query and a key; None for their share of 3/4 of hidden_size.
        gdn_value_dim: None for twice the key's.
        gdn_k_heads, gdn_v_heads: heads of keys and values; None for `gdn_num_heads`. There is a state for each head of
            values.
        gdn_conv_kernel: taps of the convolutions of q, k and v.
        gdn_conv_activation: after them: "silu" or "none".
        gdn_gate: norm(o) * activation(W_g x) rather than norm(o). gdn_gate_activation: "silu" or "sigmoid".
        gdn_negative_eigenvalues: beta in (0, 2) rather than (0, 1).
    """

    model_type = "rnnzoo-gated_delta_net"
    mixer = "gated_delta_net"
    # As in flash-linear-attention, whose authors are the paper's: as many parameters as a Transformer of 24 layers.
    sizes = {
        "1.3B": {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 21, "intermediate_size": 5632}
        | {"gdn_num_heads": 6, "rms_norm_eps": 1e-6}
    }

    gdn_num_heads: int | None = None
    gdn_key_dim: int | None = None
    gdn_value_dim: int | None = None
    gdn_k_heads: int | None = None
    gdn_v_heads: int | None = None
    gdn_conv_kernel: int = 4
    gdn_conv_activation: str = "silu"
    gdn_gate: bool = True
    gdn_gate_activation: str = "silu"
    gdn_negative_eigenvalues: bool = False

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        inner = max(1, 3 * config.hidden_size // 4)
        if config.gdn_num_heads is None:
            config.gdn_num_heads = max(2, round(inner / (config.gdn_key_dim or 256)))
        if config.gdn_key_dim is None:
            config.gdn_key_dim = max(1, inner // config.gdn_num_heads)
        if config.gdn_value_dim is None:
            config.gdn_value_dim = 2 * config.gdn_key_dim
        derive_delta(config, "gdn")
        if config.gdn_gate_activation not in ("silu", "sigmoid"):
            raise ValueError(f"gdn_gate_activation must be 'silu' or 'sigmoid', got {config.gdn_gate_activation!r}.")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """One state per kv head; no activation after the convolutions."""
        return delta_student("gdn", num_heads, num_kv_heads, head_dim)
