"""transformers' Mamba-2 checkpoints (`model_type` "mamba2") under the zoo's names."""

from __future__ import annotations

import math

from ...kernels.errors import RnnzooError
from .configuration_mamba2 import Mamba2Config

__all__ = ["convert_config", "rename"]

# transformers' Mamba2Config leaves out of config.json what equals its defaults, so they are needed here.
DEFAULTS = {
    "num_heads": 128,
    "head_dim": 64,
    "vocab_size": 32768,
    "hidden_size": 4096,
    "state_size": 128,
    "num_hidden_layers": 64,
    "layer_norm_epsilon": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "time_step_limit": [0.0, math.inf],
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "initializer_range",
)
RENAMED = {
    "num_heads": "ssm_num_heads",
    "head_dim": "ssm_head_dim",
    "state_size": "ssm_state_size",
    "n_groups": "ssm_groups",
    "conv_kernel": "ssm_conv_kernel",
    "use_conv_bias": "ssm_conv_bias",
    "time_step_min": "ssm_time_step_min",
    "time_step_max": "ssm_time_step_max",
    "time_step_floor": "ssm_time_step_floor",
    "layer_norm_epsilon": "rms_norm_eps",
}
PREFIXES = (
    ("backbone.embeddings.", "model.embed_tokens."),
    ("backbone.embedding.", "model.embed_tokens."),
    ("backbone.norm_f.", "model.norm."),
    ("backbone.layers.", "model.layers."),
)


def convert_config(source: dict) -> Mamba2Config:
    """Our configuration for transformers' one, as read from config.json.

    Raises:
        RnnzooError: another model type, or an activation other than SiLU.
    """
    if source.get("model_type") != "mamba2":
        raise RnnzooError(f"Expected a checkpoint of model_type 'mamba2', got '{source.get('model_type')}'.")
    values = DEFAULTS | {key: value for key, value in source.items() if key in DEFAULTS}
    if values["hidden_act"] not in ("silu", "swish"):
        raise RnnzooError(f"Mamba-2 is defined with SiLU, but this checkpoint has hidden_act='{values['hidden_act']}'.")
    fields = {name: values[name] for name in SAME} | {new: values[old] for old, new in RENAMED.items()}
    bounds = [_number(x) for x in values["time_step_limit"]]
    return Mamba2Config(
        **fields,
        attention_bias=values["use_bias"],
        attention_output_bias=values["use_bias"],
        ssm_time_step_limit=None if bounds == [0.0, math.inf] else bounds,
        dtype=source.get("dtype", source.get("torch_dtype")),
    )


def _number(value: float | dict) -> float:
    # transformers writes infinity into JSON as {"__float__": "Infinity"}.
    return float(value["__float__"].replace("Infinity", "inf")) if isinstance(value, dict) else float(value)


def rename(name: str) -> str:
    """backbone.layers.3.mixer.D -> model.layers.3.mixer.D, and so on."""
    for old, new in PREFIXES:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    parts = name.split(".")
    if name.startswith("model.layers.") and parts[3] == "norm":
        parts[3] = "input_layernorm"
    return ".".join(parts)
