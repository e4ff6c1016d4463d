"""What a model will be, before it is built: its class, its parameters, its bytes of state. No weights are allocated."""

from __future__ import annotations

import torch

from .configuration import RecurrentConfig
from .folders import architecture_module
from .heads import RecurrentForCausalLM
from .model import RecurrentBlock
from .registry import ATTENTION_TYPES

__all__ = [
    "architecture_config",
    "attention_bytes_per_token",
    "causal_lm_class",
    "layer_state_bytes",
    "parameter_count",
    "state_bytes",
    "window_bytes",
]


def causal_lm_class(architecture: str) -> type[RecurrentForCausalLM]:
    """The model class of an architecture; the generic one for attention."""
    if architecture in ATTENTION_TYPES:
        return RecurrentForCausalLM
    module = architecture_module(architecture, "modeling")
    return next(
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, RecurrentForCausalLM) and cls.__module__ == module.__name__
    )


def architecture_config(architecture: str) -> type[RecurrentConfig]:
    """The configuration class of an architecture, whichever mixer it names."""
    found = causal_lm_class(architecture).config_class
    assert found is not None and issubclass(found, RecurrentConfig)
    return found


def parameter_count(config: RecurrentConfig) -> int:
    """Parameters of a causal language model, tied ones once."""
    with torch.device("meta"):
        return RecurrentForCausalLM(config).num_parameters()


def state_bytes(config: RecurrentConfig, dtype: torch.dtype) -> int:
    """Bytes of all states but keys and values of attention, for one sequence, in a model of `dtype`."""
    return sum(layer_state_bytes(config, dtype))


def layer_state_bytes(config: RecurrentConfig, dtype: torch.dtype) -> list[int]:
    """The same of each layer."""
    meta = torch.device("meta")
    with meta:
        blocks = [RecurrentBlock(config, i) for i in range(config.num_hidden_layers)]
        return [block.init_state(1, meta, dtype).num_bytes() for block in blocks]


def attention_bytes_per_token(config: RecurrentConfig, dtype: torch.dtype) -> int:
    """Bytes that every token adds to the keys and values of all full-attention layers, for one sequence."""
    layers = config.layer_types.count("full_attention")
    return layers * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize


def window_bytes(config: RecurrentConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of all sliding-window attention layers, their windows full, for one sequence."""
    layers = config.layer_types.count("sliding_attention")
    tokens = (config.sliding_window or 1) - 1
    return layers * tokens * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
