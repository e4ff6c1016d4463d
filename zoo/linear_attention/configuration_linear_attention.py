"""Configuration of linear attention."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig

# The autoregressive image models of Katharopoulos et al. 2020, section 4.2; a pixel is one of 256 values.
IMAGES = {"vocab_size": 256, "hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 1024}
IMAGES |= {"mlp_type": "plain", "hidden_act": "gelu", "norm_type": "layer", "mlp_bias": True}
IMAGES |= {"attention_bias": True, "attention_output_bias": True}


@strict
class LinearAttentionConfig(RecurrentConfig):
    """`RecurrentConfig`, and what takes the place of the softmax.

    Args:
        linear_feature_map: phi of q and k: "elu" for elu(x) + 1 (Katharopoulos et al. 2020), "relu" (Kasai et al. 2021,
            without their learned matrix), or "identity".
        linear_normalizer: "sum": the sum of the weights as denominator; "rms": RMSNorm over each head in its place
            (Qin et al. 2022), which "identity" needs, because its weights may cancel.
    """

    model_type = "rnnzoo-linear_attention"
    mixer = "linear_attention"
    sizes = {
        "MNIST": IMAGES | {"num_hidden_layers": 8, "max_position_embeddings": 784},
        "CIFAR-10": IMAGES | {"num_hidden_layers": 16, "max_position_embeddings": 3072},
    }

    linear_feature_map: str = "elu"
    linear_normalizer: str = "sum"

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        known = {"linear_feature_map": ("elu", "relu", "identity"), "linear_normalizer": ("sum", "rms")}
        for name, allowed in known.items():
            if getattr(config, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(config, name)!r}.")
        if config.linear_feature_map == "identity" and config.linear_normalizer == "sum":
            raise ValueError("linear_feature_map='identity' has weights of either sign; use linear_normalizer='rms'.")
