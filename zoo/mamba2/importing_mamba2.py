"""Mamba-2's checkpoints of transformers (`model_type` "mamba2") and of the authors' mamba_ssm package."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ...kernels.errors import RnnzooError
from ..core.importing import Format, Rule, of_type
from ..mamba import mamba_ssm
from .configuration_mamba2 import Mamba2Config

DEFAULTS = mamba_ssm.DEFAULTS | {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "state_size": 128}
DEFAULTS |= {"pad_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
DEFAULTS |= {"num_heads": 128, "head_dim": 64, "n_groups": 8, "time_step_limit": [0.0, math.inf]}
RENAMED = mamba_ssm.RENAMED | {"state_size": "ssm_state_size", "n_groups": "ssm_groups"}
RENAMED |= {"num_heads": "ssm_num_heads", "head_dim": "ssm_head_dim"}
SSM_CFG = mamba_ssm.SSM_CFG | {"d_state": "ssm_state_size", "headdim": "ssm_head_dim", "ngroups": "ssm_groups"}
SSM_CFG |= {"dt_limit": "ssm_time_step_limit", "norm_before_gate": "ssm_norm_before_gate"}


def _to_ours(source: dict, shapes: dict) -> Mamba2Config:
    fields, values = mamba_ssm.from_transformers(source, DEFAULTS, RENAMED)
    return Mamba2Config(**fields, ssm_time_step_limit=_limit(values["time_step_limit"]))


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
    theirs = mamba_ssm.to_transformers(config, "mamba2", "Mamba2", RENAMED)
    bounds = config.ssm_time_step_limit
    limit = {} if bounds is None else {"time_step_limit": list(bounds)}
    return theirs | {"expand": config.ssm_expand, "rms_norm": True} | limit


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
    Format("transformers", of_type("mamba2"), _to_ours, _to_theirs, _rules),
    mamba_ssm.authors_format("Mamba2", _from_mamba_ssm, _to_mamba_ssm, _names),
)
