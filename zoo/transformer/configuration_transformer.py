"""Configuration of the Llama-style Transformer."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig

SMOLLM2 = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
LLAMA = {"vocab_size": 32000, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 10000.0}}


@strict
class TransformerConfig(RecurrentConfig):
    """Nothing beyond `RecurrentConfig`, whose fields are Llama's."""

    model_type = "rnnzoo-transformer"
    mixer = "transformer"
    # SmolLM2 (135M, 360M, 1.7B), TinyLlama (1.1B), LLaMA (7B).
    sizes = {
        "135M": SMOLLM2
        | {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {"intermediate_size": 1536, "rope_parameters": {"rope_theta": 100000.0}},
        "360M": SMOLLM2
        | {"hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5}
        | {"intermediate_size": 2560, "rope_parameters": {"rope_theta": 100000.0}},
        "1.1B": LLAMA
        | {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"intermediate_size": 5632},
        "1.7B": SMOLLM2
        | {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32}
        | {"intermediate_size": 8192, "rope_parameters": {"rope_theta": 130000.0}},
        "7B": LLAMA
        | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    }
