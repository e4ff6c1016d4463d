"""Configuration of minLSTM."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..mingru.configuration_mingru import MinGRUConfig


@strict
class MinLSTMConfig(MinGRUConfig):
    """minGRU's sizes.

    Args:
        minlstm_forget_bias: bias of the forget gate at the start; above 0 it remembers longer, and learns faster on
            tasks of memory (the paper's figure on forget gates).
    """

    model_type = "rnnzoo-minlstm"
    mixer = "minlstm"

    minlstm_forget_bias: float = 0.0

    @staticmethod
    def derive(config: MinGRUConfig) -> None:
        MinGRUConfig.derive(config)
        if config.minlstm_forget_bias and not config.minrnn_bias:
            raise ValueError(f"minlstm_forget_bias is {config.minlstm_forget_bias}, but minrnn_bias is False.")
