"""Configuration of HGRN."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class HGRNConfig(RecurrentConfig):
    """`RecurrentConfig`, and the width of the state.

    Args:
        hgrn_expand: width of the state over hidden_size.
        hgrn_conv_kernel: taps of the convolutions of input and forget gate; 0 for none, as in the paper.
        hgrn_lower_bounds: learn bounds of the forget gates that rise over the layers.
    """

    model_type = "rnnzoo-hgrn"
    mixer = "hgrn"
    # The size trained on 100B tokens by the authors of flash-linear-attention.
    sizes = {
        "1.3B": {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632}
        | {"rms_norm_eps": 1e-6}
    }

    hgrn_expand: int = 1
    hgrn_conv_kernel: int = 0
    hgrn_lower_bounds: bool = True

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.hgrn_expand < 1 or config.hgrn_conv_kernel < 0:
            raise ValueError(
                f"hgrn_expand ({config.hgrn_expand}) must be at least 1, hgrn_conv_kernel "
                f"({config.hgrn_conv_kernel}) at least 0."
            )
