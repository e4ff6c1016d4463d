"""Configuration of Based."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


def published(mixer: str, width: int, layers: int, every: tuple[int, ...]) -> dict:
    """As the authors trained it: layers `every` are `mixer`, the ones after them windows, the others convolutions."""
    kinds = dict.fromkeys(every, mixer) | {i + 1: "sliding_attention" for i in every}
    return {
        "vocab_size": 50257,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "layer_types": [kinds.get(i, "based.convolution") for i in range(layers)],
        "sliding_window": 256,
        "tie_word_embeddings": True,
    }


@strict
class BasedConfig(RecurrentConfig):
    """`RecurrentConfig`, and the width of queries and keys, whose square is the size of the state.

    By default every layer is linear attention. The paper's models are a mix, as in `sizes`: "based.convolution" layers
    that gate a few neighbouring tokens, "sliding_attention", and "based" for what is further away.

    Args:
        based_feature_dim: d', channels of a head of q and k; the feature map makes 1 + d' + d' (d' + 1) / 2 of them.
        based_conv_width: inner width of "based.convolution" layers; None: twice `hidden_size`.
        based_conv_kernel: taps of their convolution.
    """

    model_type = "rnnzoo-based"
    mixer = "based"
    # From the training configurations beside those of "Just read twice" (HazyResearch/prefix-linear-attention); their
    # 360M model also scales each token's weights by a factor of its own, which is left out here.
    sizes = {
        "360M": published("based", 1024, 27, (1, 6, 11, 16, 21)),
        "1.3B": published("based", 1792, 36, (1, 6, 11, 16, 21, 27, 33)),
    }

    based_feature_dim: int = 16
    based_conv_width: int | None = None
    based_conv_kernel: int = 3

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.based_conv_width is None:
            config.based_conv_width = 2 * config.hidden_size
        for name in ("based_feature_dim", "based_conv_width", "based_conv_kernel"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """Keys as wide as an attention layer's. The state then has head_dim^2 / 2 rows for each head."""
        return {"based_feature_dim": head_dim}
