"""Configuration of minGRU."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class MinGRUConfig(RecurrentConfig):
    """`RecurrentConfig`, and the sizes that minGRU and minLSTM share.

    Args:
        minrnn_expand: width of the state over hidden_size; 2 in the paper's language models.
        minrnn_conv_kernel: taps of the convolution before the recurrence; 0 for none.
        minrnn_bias: biases of the projections.
    """

    model_type = "rnnzoo-mingru"
    mixer = "mingru"
    sizes = {"Shakespeare": {"vocab_size": 65, "hidden_size": 384, "num_hidden_layers": 3}}

    minrnn_expand: int = 2
    minrnn_conv_kernel: int = 4
    minrnn_bias: bool = True

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.minrnn_expand < 1 or config.minrnn_conv_kernel < 0:
            raise ValueError(
                f"minrnn_expand ({config.minrnn_expand}) must be at least 1, minrnn_conv_kernel "
                f"({config.minrnn_conv_kernel}) at least 0."
            )
