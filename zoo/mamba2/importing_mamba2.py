"""Mamba-2's checkpoints of transformers (`model_type` "mamba2") and of the authors' mamba_ssm package."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ...kernels.errors import RnnzooError
from ..core.importing import Format, Rule
from ..mamba import mamba_ssm
from .configuration_mamba2 import Mamba2Config

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
# mamba_ssm's options of a layer.
SSM_CFG = {
    "d_state": "ssm_state_size",
    "headdim": "ssm_head_dim",
    "ngroups": "ssm_groups",
    "expand": "ssm_expand",
    "d_conv": "ssm_conv_kernel",
    "conv_bias": "ssm_conv_bias",
    "dt_min": "ssm_time_step_min",
    "dt_max": "ssm_time_step_max",
    "dt_init_floor": "ssm_time_step_floor",
    "dt_limit": "ssm_time_step_limit",
    "norm_before_gate": "ssm_norm_before_gate",
    "bias": "attention_bias",
}


def _to_ours(source: dict, shapes: dict) -> Mamba2Config:
    values = DEFAULTS | {key: value for key, value in source.items() if key in DEFAULTS}
    if values["hidden_act"] not in ("silu", "swish"):
        raise RnnzooError(f"Mamba-2 is defined with SiLU, but this checkpoint has hidden_act='{values['hidden_act']}'.")
    fields = {name: values[name] for name in SAME} | {new: values[old] for old, new in RENAMED.items()}
    return Mamba2Config(
        **fields,
        attention_bias=values["use_bias"],
        attention_output_bias=values["use_bias"],
        ssm_time_step_limit=_limit(values["time_step_limit"]),
    )


def _limit(bounds: Sequence) -> list[float] | None:
    # transformers writes infinity into JSON as {"__float__": "Infinity"}.
    low, high = (float(x["__float__"].replace("Infinity", "inf")) if isinstance(x, dict) else float(x) for x in bounds)
    return None if (low, high) == (0.0, math.inf) else [low, high]


def _refuse(config: Mamba2Config) -> None:
    if set(config.layer_types) != {"mamba2"} or config.intermediate_size or config.ssm_kv_heads or config.qk_norm:
        raise RnnzooError(
            "Other implementations' Mamba-2 has neither other layers, MLPs, grouped heads nor norms of B and C."
        )
    if config.attention_bias != config.attention_output_bias:
        raise RnnzooError("Other implementations' Mamba-2 has biases on both projections or on none.")


def _to_theirs(config: Mamba2Config) -> dict:
    _refuse(config)
    if config.ssm_norm_before_gate or config.norm_type != "rms":
        raise RnnzooError("transformers' Mamba-2 has RMS norms alone, the mixer's after the gate.")
    bounds = config.ssm_time_step_limit
    return (
        {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "hidden_act": "silu"}
        | {name: getattr(config, name) for name in SAME}
        | {old: getattr(config, new) for old, new in RENAMED.items()}
        | {"use_bias": config.attention_bias, "expand": config.ssm_expand}
        | ({} if bounds is None else {"time_step_limit": list(bounds)})
        | {"rms_norm": True, "dtype": str(config.dtype).removeprefix("torch.")}
    )


def _names(config: Mamba2Config) -> list[str]:
    names = ["A_log", "D", "dt_bias", "in_proj.weight", "conv1d.weight", "norm.weight", "out_proj.weight"]
    names += ["conv1d.bias"] if config.ssm_conv_bias else []
    return names + (["in_proj.bias", "out_proj.bias"] if config.attention_bias else [])


def _rules(config: Mamba2Config) -> Iterator[Rule]:
    return mamba_ssm.rules(config, _names(config), "backbone.embeddings.weight")


def _from_mamba_ssm(source: dict, shapes: dict) -> Mamba2Config:
    options = {"headdim": 64, "dt_limit": [0.0, math.inf]} | source["ssm_cfg"]
    for name, value in (("d_ssm", None), ("rmsnorm", True), ("D_has_hdim", False)):
        if options.pop(name, value) != value:
            raise RnnzooError(
                f"This mamba_ssm checkpoint has {name} other than {value}, which the importer cannot read."
            )
    options["dt_limit"] = _limit(options["dt_limit"])
    return Mamba2Config(**mamba_ssm.config_fields(source | {"ssm_cfg": options}, shapes, SSM_CFG))


def _to_mamba_ssm(config: Mamba2Config) -> dict:
    _refuse(config)
    if config.ssm_num_heads * config.ssm_head_dim != config.ssm_expand * config.hidden_size:
        raise RnnzooError("mamba_ssm's Mamba-2 has heads that fill ssm_expand times hidden_size.")
    theirs = mamba_ssm.their_config(config, "Mamba2", SSM_CFG)
    if config.ssm_time_step_limit is None:
        del theirs["ssm_cfg"]["dt_limit"]  # the default is infinity, which JSON cannot say
    return theirs


FORMATS = (
    Format("transformers", lambda config, shapes: config.get("model_type") == "mamba2", _to_ours, _to_theirs, _rules),
    Format(
        "mamba_ssm",
        lambda config, shapes: mamba_ssm.layer_of(config) == "Mamba2",
        _from_mamba_ssm,
        _to_mamba_ssm,
        lambda config: mamba_ssm.rules(config, _names(config)),
        file=mamba_ssm.FILE,
    ),
)
