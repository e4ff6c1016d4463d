"""Configuration of Griffin."""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict

from ..hawk.configuration_hawk import HawkConfig

PATTERN = ("griffin", "griffin", "sliding_attention")


def normalizer(hidden_size: int) -> float:
    """RecurrentGemma's factor on the embeddings, sqrt(hidden_size) in bfloat16, which it is rounded to in any model."""
    return float(torch.tensor(hidden_size**0.5, dtype=torch.bfloat16))


@strict
class GriffinConfig(HawkConfig):
    """`HawkConfig`, with RecurrentGemma's defaults around the recurrent layers.

    Two recurrent layers, then one of local attention with one head of keys and values and rotation of half of the
    channels; embeddings scaled by sqrt(hidden_size); logits bounded by 30. In `layer_types` the recurrent layers are
    "griffin". The paper's own models have neither factor (`embedding_scale=1.0`) nor bound (`logit_cap=None`).
    """

    model_type = "rnnzoo-griffin"
    mixer = "griffin"
    sizes = {
        "7B": HawkConfig.sizes["7B"] | {"sliding_window": 1024, "embedding_scale": 1.0, "logit_cap": None},
        "RecurrentGemma-2B": {"vocab_size": 256000, "hidden_size": 2560, "num_hidden_layers": 26}
        | {"num_attention_heads": 10},
        "RecurrentGemma-9B": {"vocab_size": 256000, "hidden_size": 4096, "num_hidden_layers": 38}
        | {"num_attention_heads": 16},
    }

    num_key_value_heads: int | None = 1
    attention_output_bias: bool = True
    sliding_window: int | None = 2048
    logit_cap: float | None = 30.0

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = [PATTERN[i % 3] for i in range(self.num_hidden_layers)]
        if self.embedding_scale is None:
            self.embedding_scale = normalizer(self.hidden_size)
        if not self.rope_parameters:
            self.rope_parameters = {"partial_rotary_factor": 0.5}
        super().__post_init__(**kwargs)

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """Hawk's sizes, without RecurrentGemma's factor on the embeddings and bound of the logits."""
        fields = HawkConfig.student_fields(num_heads, num_kv_heads, head_dim)
        return fields | {"embedding_scale": 1.0, "logit_cap": None}
