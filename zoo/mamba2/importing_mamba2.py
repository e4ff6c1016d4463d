"""transformers' Mamba-2 checkpoints (`model_type` "mamba2") under the zoo's names."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...kernels.errors import RnnzooError
from ..core.importing import Format, Rule, renamed
from .configuration_mamba2 import Mamba2Config

__all__ = ["FORMATS"]

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


def _to_ours(source: dict, shapes: dict) -> Mamba2Config:
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


def _to_theirs(config: Mamba2Config) -> dict:
    if set(config.layer_types) != {"mamba2"} or config.intermediate_size or config.ssm_kv_heads or config.qk_norm:
        raise RnnzooError("transformers' Mamba-2 has neither other layers, MLPs, grouped heads nor norms of B and C.")
    if config.attention_bias != config.attention_output_bias:
        raise RnnzooError("transformers' Mamba-2 has biases on both projections or on none.")
    bounds = config.ssm_time_step_limit
    return (
        {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "hidden_act": "silu"}
        | {name: getattr(config, name) for name in SAME}
        | {old: getattr(config, new) for old, new in RENAMED.items()}
        | {"use_bias": config.attention_bias, "expand": config.ssm_expand}
        | ({} if bounds is None else {"time_step_limit": list(bounds)})
        | {"rms_norm": True, "dtype": str(config.dtype).removeprefix("torch.")}
    )


def _rules(config: Mamba2Config) -> Iterator[Rule]:
    yield Rule(("model.embed_tokens.weight",), ("backbone.embeddings.weight",))
    yield Rule(("model.norm.weight",), ("backbone.norm_f.weight",))
    yield Rule(("lm_head.weight",), ("lm_head.weight",))
    names = ["A_log", "D", "dt_bias", "in_proj.weight", "conv1d.weight", "norm.weight", "out_proj.weight"]
    names += ["conv1d.bias"] if config.ssm_conv_bias else []
    names += ["in_proj.bias", "out_proj.bias"] if config.attention_bias else []
    for i in range(config.num_hidden_layers):
        yield from renamed(f"model.layers.{i}.mixer.", f"backbone.layers.{i}.mixer.", names)
        yield Rule((f"model.layers.{i}.input_layernorm.weight",), (f"backbone.layers.{i}.norm.weight",))


FORMATS = (
    Format("transformers", lambda config, shapes: config.get("model_type") == "mamba2", _to_ours, _to_theirs, _rules),
)
