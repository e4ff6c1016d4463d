"""Configuration of Mamba-2."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig

_PAPER = {"vocab_size": 50288, "tie_word_embeddings": True}


@strict
class Mamba2Config(RecurrentConfig):
    """`RecurrentConfig`, without an MLP by default, and the sizes of the state space.

    Biases of the input and output projections are `attention_bias` and `attention_output_bias`; with `qk_norm`, B and C
    are normed per group after their projection.

    Args:
        ssm_expand: inner width over hidden_size, where `ssm_num_heads` is None.
        ssm_num_heads: heads, each with its own dt, A and D. ssm_head_dim: channels of a head.
        ssm_state_size: channels of B and C.
        ssm_groups: groups of heads that share B, C and the statistics of the output norm.
        ssm_kv_heads: heads of x and of B, repeated to `ssm_num_heads` after the convolution (students of grouped-query
            attention); None: x has `ssm_num_heads` heads and B has `ssm_groups`.
        ssm_conv_kernel: taps of the convolution. ssm_conv_bias: its bias.
        ssm_time_step_min, ssm_time_step_max, ssm_time_step_floor: dt at initialisation, in steps.
        ssm_time_step_limit: [lower, upper] bounds of dt; None: no bounds.
        ssm_norm_before_gate: norm(y) * silu(z) rather than norm(y * silu(z)).
    """

    model_type = "rnnzoo-mamba2"
    mixer = "mamba2"
    sizes = {
        "130M": {"hidden_size": 768, "num_hidden_layers": 24} | _PAPER,
        "370M": {"hidden_size": 1024, "num_hidden_layers": 48} | _PAPER,
        "780M": {"hidden_size": 1536, "num_hidden_layers": 48} | _PAPER,
        "1.3B": {"hidden_size": 2048, "num_hidden_layers": 48} | _PAPER,
        "2.7B": {"hidden_size": 2560, "num_hidden_layers": 64} | _PAPER,
    }

    intermediate_size: int | None = 0
    ssm_expand: int = 2
    ssm_num_heads: int | None = None
    ssm_head_dim: int | None = None
    ssm_state_size: int = 128
    ssm_groups: int = 1
    ssm_kv_heads: int | None = None
    ssm_conv_kernel: int = 4
    ssm_conv_bias: bool = True
    ssm_time_step_min: float = 0.001
    ssm_time_step_max: float = 0.1
    ssm_time_step_floor: float = 1e-4
    ssm_time_step_limit: list[float] | tuple[float, ...] | None = None
    ssm_norm_before_gate: bool = False

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        inner = config.ssm_expand * config.hidden_size
        if config.ssm_head_dim is None:
            if config.ssm_num_heads is None:
                config.ssm_head_dim = next(width for width in range(64, 0, -1) if inner % width == 0)
            else:
                config.ssm_head_dim = inner // config.ssm_num_heads
        if config.ssm_num_heads is None:
            config.ssm_num_heads = inner // config.ssm_head_dim
        for name in ("ssm_groups", "ssm_kv_heads"):
            parts = getattr(config, name)
            if parts is not None and config.ssm_num_heads % parts:
                raise ValueError(f"ssm_num_heads ({config.ssm_num_heads}) must be a multiple of {name} ({parts}).")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """Sizes that fit an attention layer's matrices: x <- v, B <- k, C <- q, one group per query head."""
        sizes = {"ssm_num_heads": num_heads, "ssm_head_dim": head_dim, "ssm_state_size": head_dim}
        return sizes | {"ssm_groups": num_heads, "ssm_kv_heads": num_kv_heads}
