"""Configuration of Hawk."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class HawkConfig(RecurrentConfig):
    """`RecurrentConfig`, with a GeGLU of 3 `hidden_size` and biases by default, and the sizes of the RG-LRU.

    Args:
        rglru_width: channels of the recurrence; None for hidden_size.
        rglru_blocks: diagonal blocks of the gates' matrices; None for `num_attention_heads`, or the next smaller number
            that divides rglru_width.
        rglru_conv_kernel: taps of the convolution before the recurrence.
        rglru_act: activation of the branch that multiplies the recurrence.
        rglru_init_variance: variance of the gates' and the convolution's weights at the start, times their inputs.
    """

    model_type = "rnnzoo-hawk"
    mixer = "hawk"
    sizes = {
        "7B": {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"rglru_width": 5632}
    }

    hidden_act: str = "gelu_pytorch_tanh"
    mlp_bias: bool = True
    norm_type: str = "rms_offset"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    rglru_width: int | None = None
    rglru_blocks: int | None = None
    rglru_conv_kernel: int = 4
    rglru_act: str = "gelu_pytorch_tanh"
    rglru_init_variance: float = 0.01

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 3 * self.hidden_size
        super().__post_init__(**kwargs)

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.rglru_width is None:
            config.rglru_width = config.hidden_size
        if config.rglru_blocks is None:
            most = config.num_attention_heads
            config.rglru_blocks = next(blocks for blocks in range(most, 0, -1) if config.rglru_width % blocks == 0)
        if config.rglru_width % config.rglru_blocks:
            raise ValueError(
                f"rglru_width ({config.rglru_width}) must be a multiple of rglru_blocks ({config.rglru_blocks})."
            )

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """One channel for every value of every query head, one block of the gates per head."""
        return {"rglru_width": num_heads * head_dim, "rglru_blocks": num_heads}
