"""Mamba's checkpoints of transformers (`model_type` "mamba", "falcon_mamba") and of the authors' mamba_ssm package."""

from __future__ import annotations

from collections.abc import Iterator

from ...kernels.errors import RnnzooError
from ..core.importing import Format, Rule, of_type
from . import mamba_ssm
from .configuration_mamba import MambaConfig

DEFAULTS = mamba_ssm.DEFAULTS | {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "state_size": 16}
DEFAULTS |= {"pad_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
DEFAULTS |= {"expand": 2, "time_step_rank": "auto", "mixer_rms_eps": 1e-6}
RENAMED = mamba_ssm.RENAMED | {"state_size": "mamba_state_size", "time_step_rank": "mamba_dt_rank"}
RENAMED |= {"expand": "ssm_expand"}
SSM_CFG = mamba_ssm.SSM_CFG | {"d_state": "mamba_state_size", "dt_rank": "mamba_dt_rank"}


def _to_ours(source: dict, shapes: dict) -> MambaConfig:
    fields, values = mamba_ssm.from_transformers(source, DEFAULTS, RENAMED)
    if fields["mamba_dt_rank"] == "auto":
        fields["mamba_dt_rank"] = None
    falcon = source["model_type"] == "falcon_mamba"
    return MambaConfig(**fields, mamba_norm_eps=values["mixer_rms_eps"] if falcon else None)


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
    if config.mamba_norm_eps is None:
        return mamba_ssm.to_transformers(config, "mamba", "Mamba", RENAMED)
    theirs = mamba_ssm.to_transformers(config, "falcon_mamba", "FalconMamba", RENAMED)
    return theirs | {"mixer_rms_eps": config.mamba_norm_eps}


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
    Format("transformers", of_type("mamba", "falcon_mamba"), _to_ours, _to_theirs, _rules),
    mamba_ssm.authors_format("Mamba1", _from_mamba_ssm, _to_mamba_ssm, _names),
)
