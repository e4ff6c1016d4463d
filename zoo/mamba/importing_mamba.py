"""Mamba's checkpoints of transformers (`model_type` "mamba", "falcon_mamba") and of the authors' mamba_ssm package."""

from __future__ import annotations

from collections.abc import Iterator

from ...kernels.errors import RnnzooError
from ..core.importing import Format, Rule
from . import mamba_ssm
from .configuration_mamba import MambaConfig

# transformers leaves out of config.json what equals its defaults, so they are needed here.
DEFAULTS = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "state_size": 16,
    "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "time_step_rank": "auto",
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "tie_word_embeddings": True,
    "mixer_rms_eps": 1e-6,
}
SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "tie_word_embeddings",
)
RENAMED = {
    "state_size": "mamba_state_size",
    "time_step_rank": "mamba_dt_rank",
    "expand": "ssm_expand",
    "conv_kernel": "ssm_conv_kernel",
    "use_conv_bias": "ssm_conv_bias",
    "time_step_min": "ssm_time_step_min",
    "time_step_max": "ssm_time_step_max",
    "time_step_floor": "ssm_time_step_floor",
    "layer_norm_epsilon": "rms_norm_eps",
}
# mamba_ssm's options of a layer.
SSM_CFG = {
    "d_state": "mamba_state_size",
    "dt_rank": "mamba_dt_rank",
    "expand": "ssm_expand",
    "d_conv": "ssm_conv_kernel",
    "conv_bias": "ssm_conv_bias",
    "dt_min": "ssm_time_step_min",
    "dt_max": "ssm_time_step_max",
    "dt_init_floor": "ssm_time_step_floor",
    "bias": "attention_bias",
}


def _to_ours(source: dict, shapes: dict) -> MambaConfig:
    values = DEFAULTS | {key: value for key, value in source.items() if key in DEFAULTS}
    if values["hidden_act"] not in ("silu", "swish"):
        raise RnnzooError(f"Mamba is defined with SiLU, but this checkpoint has hidden_act='{values['hidden_act']}'.")
    fields = {name: values[name] for name in SAME} | {new: values[old] for old, new in RENAMED.items()}
    if fields["mamba_dt_rank"] == "auto":
        fields["mamba_dt_rank"] = None
    return MambaConfig(
        **fields,
        attention_bias=values["use_bias"],
        attention_output_bias=values["use_bias"],
        mamba_norm_eps=values["mixer_rms_eps"] if source["model_type"] == "falcon_mamba" else None,
    )


def _refuse(config: MambaConfig) -> None:
    if set(config.layer_types) != {"mamba"} or config.intermediate_size or config.mamba_groups is not None:
        raise RnnzooError("Other implementations' Mamba has neither other layers, MLPs nor groups of B and C.")
    if config.attention_bias != config.attention_output_bias:
        raise RnnzooError("Other implementations' Mamba has biases on both projections or on none.")
    if config.mamba_inner_size != config.ssm_expand * config.hidden_size:
        raise RnnzooError("Other implementations' Mamba has an inner width of ssm_expand times hidden_size.")


def _to_theirs(config: MambaConfig) -> dict:
    _refuse(config)
    if config.norm_type != "rms":
        raise RnnzooError("transformers' Mamba has RMS norms alone.")
    kind, name = ("mamba", "Mamba") if config.mamba_norm_eps is None else ("falcon_mamba", "FalconMamba")
    return (
        {"architectures": [f"{name}ForCausalLM"], "model_type": kind, "hidden_act": "silu"}
        | {name: getattr(config, name) for name in SAME}
        | {old: getattr(config, new) for old, new in RENAMED.items()}
        | {"use_bias": config.attention_bias, "dtype": str(config.dtype).removeprefix("torch.")}
        | ({} if config.mamba_norm_eps is None else {"mixer_rms_eps": config.mamba_norm_eps})
    )


def _names(config: MambaConfig) -> list[str]:
    names = ["A_log", "D", "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"]
    names += ["out_proj.weight"] + (["conv1d.bias"] if config.ssm_conv_bias else [])
    return names + (["in_proj.bias", "out_proj.bias"] if config.attention_bias else [])


def _rules(config: MambaConfig) -> Iterator[Rule]:
    return mamba_ssm.rules(config, _names(config), "backbone.embeddings.weight")


def _from_mamba_ssm(source: dict, shapes: dict) -> MambaConfig:
    fields = mamba_ssm.config_fields(source, shapes, SSM_CFG)
    if fields.get("mamba_dt_rank") == "auto":
        fields["mamba_dt_rank"] = None
    return MambaConfig(**fields)


def _to_mamba_ssm(config: MambaConfig) -> dict:
    _refuse(config)
    if config.mamba_norm_eps is not None:
        raise RnnzooError("mamba_ssm's Mamba has no norms of B, C and dt.")
    return mamba_ssm.their_config(config, "Mamba1", SSM_CFG)


FORMATS = (
    Format(
        "transformers",
        lambda config, shapes: config.get("model_type") in ("mamba", "falcon_mamba"),
        _to_ours,
        _to_theirs,
        _rules,
    ),
    Format(
        "mamba_ssm",
        lambda config, shapes: mamba_ssm.layer_of(config) == "Mamba1",
        _from_mamba_ssm,
        _to_mamba_ssm,
        lambda config: mamba_ssm.rules(config, _names(config)),
        file=mamba_ssm.FILE,
    ),
)
