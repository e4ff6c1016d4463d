"""Configuration of the block-diagonal input-dependent linear RNN."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class BlockLRNNConfig(RecurrentConfig):
    """`RecurrentConfig`, by default with LayerNorm and without an MLP, and the sizes of the transitions.

    Args:
        block_lrnn_block_size: b, width of a block, at least 2.
        block_lrnn_inner_size: hidden width of the network that makes the transitions out of a token; None: b D, as the
            authors have it, which grows with the square of hidden_size.
        block_lrnn_norm: p of the norm of a transition's columns, of which the largest is made 1.
    """

    model_type = "rnnzoo-block_lrnn"
    mixer = "block_lrnn"
    # The authors' runs: 5 numbers, and for arithmetic 3 signs.
    sizes = {
        "Sum": {"vocab_size": 5, "hidden_size": 64, "num_hidden_layers": 1},
        "EvenPair": {"vocab_size": 5, "hidden_size": 64, "num_hidden_layers": 1},
        "ModArith": {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 3},
    }

    intermediate_size: int | None = 0
    norm_type: str = "layer"
    block_lrnn_block_size: int = 8
    block_lrnn_inner_size: int | None = None
    block_lrnn_norm: float = 1.2

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.block_lrnn_block_size < 2:
            raise ValueError(f"block_lrnn_block_size must be at least 2, got {config.block_lrnn_block_size}.")
        if config.block_lrnn_norm < 1:
            raise ValueError(f"block_lrnn_norm must be at least 1, got {config.block_lrnn_norm}.")
        if config.block_lrnn_inner_size is None:
            blocks = -(-config.hidden_size // config.block_lrnn_block_size)
            config.block_lrnn_inner_size = blocks * config.block_lrnn_block_size**2
