"""Configuration of Mamba."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig

_PAPER = {"vocab_size": 50280, "tie_word_embeddings": True}


@strict
class MambaConfig(RecurrentConfig):
    """`RecurrentConfig`, without an MLP by default, and the sizes of the state space.

    Biases of the input and output projections are `attention_bias` and `attention_output_bias`. Names that begin with
    `ssm_` are Mamba-2's too.

    Args:
        ssm_expand: inner width over hidden_size, where `mamba_inner_size` is None.
        ssm_conv_kernel: taps of the convolution. ssm_conv_bias: its bias.
        ssm_time_step_min, ssm_time_step_max, ssm_time_step_floor: dt at initialisation, in steps.
        mamba_inner_size: channels of the state space model. mamba_state_size: state numbers of a channel.
        mamba_dt_rank: rank of the projection to dt; None for hidden_size / 16, rounded up.
        mamba_norm_eps: epsilon of RMS norms without weights over B, C and the low-rank dt (FalconMamba); None: none.
        mamba_groups: students of attention: groups of channels with their own B and C, which come from the hidden
            states instead of from x; `qk_norm` then norms them per group. None: Mamba proper, all share one B and C.
        mamba_kv_groups: groups of x and B, repeated to `mamba_groups`; None: as many.
    """

    model_type = "rnnzoo-mamba"
    mixer = "mamba"
    sizes = {
        "130M": {"hidden_size": 768, "num_hidden_layers": 24} | _PAPER,
        "370M": {"hidden_size": 1024, "num_hidden_layers": 48} | _PAPER,
        "790M": {"hidden_size": 1536, "num_hidden_layers": 48} | _PAPER,
        "1.4B": {"hidden_size": 2048, "num_hidden_layers": 48} | _PAPER,
        "2.8B": {"hidden_size": 2560, "num_hidden_layers": 64} | _PAPER,
    }

    intermediate_size: int | None = 0
    ssm_expand: int = 2
    ssm_conv_kernel: int = 4
    ssm_conv_bias: bool = True
    ssm_time_step_min: float = 0.001
    ssm_time_step_max: float = 0.1
    ssm_time_step_floor: float = 1e-4
    mamba_inner_size: int | None = None
    mamba_state_size: int = 16
    mamba_dt_rank: int | None = None
    mamba_norm_eps: float | None = None
    mamba_groups: int | None = None
    mamba_kv_groups: int | None = None

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.mamba_inner_size is None:
            config.mamba_inner_size = config.ssm_expand * config.hidden_size
        if config.mamba_dt_rank is None:
            config.mamba_dt_rank = -(-config.hidden_size // 16)
        groups, kv_groups = config.mamba_groups, config.mamba_kv_groups
        if groups is not None and config.mamba_inner_size % groups:
            raise ValueError(
                f"mamba_inner_size ({config.mamba_inner_size}) must be a multiple of mamba_groups ({groups})."
            )
        if kv_groups is not None and (groups is None or groups % kv_groups):
            raise ValueError(f"mamba_groups ({groups}) must be a multiple of mamba_kv_groups ({kv_groups}).")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """Sizes that fit an attention layer's matrices: x <- v, B <- k, C <- q, one group per query head."""
        sizes = {"mamba_inner_size": num_heads * head_dim, "mamba_state_size": head_dim}
        return sizes | {"mamba_groups": num_heads, "mamba_kv_groups": num_kv_heads}
