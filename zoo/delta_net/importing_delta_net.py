"""DeltaNet checkpoints of flash-linear-attention (`model_type` "delta_net") under the zoo's names."""

from __future__ import annotations

from collections.abc import Iterator

from ..core.fla import delta_rules, delta_settings, fla_config, fla_fields, fla_rules, fla_values
from ..core.importing import Format, Rule, of_type
from .configuration_delta_net import DeltaNetConfig

OWN = {"expand_k": 1.0, "expand_v": 1.0, "use_gate": False, "allow_neg_eigval": False, "conv_size": 4, "num_heads": 16}
# use_output_norm is written but not read by their code, which always norms.
ONLY = {"use_short_conv": True, "use_beta": True, "qk_norm": "l2", "qk_activation": "silu"}


def _to_ours(source: dict, shapes: dict) -> DeltaNetConfig:
    values = fla_values(source, OWN, ONLY)
    heads, width = values["num_heads"], values["hidden_size"]
    return DeltaNetConfig(
        **fla_fields(values),
        delta_num_heads=heads,
        delta_key_dim=round(width * values["expand_k"]) // heads,
        delta_value_dim=round(width * values["expand_v"]) // heads,
        delta_conv_kernel=values["conv_size"],
        delta_gate=values["use_gate"],
        delta_negative_eigenvalues=values["allow_neg_eigval"],
    )


def _to_theirs(config: DeltaNetConfig) -> dict:
    heads, width = config.delta_num_heads, config.hidden_size
    own = delta_settings(config, "delta", grouped=False) | ONLY
    own |= {"expand_k": heads * config.delta_key_dim / width, "expand_v": heads * config.delta_value_dim / width}
    own |= {"use_gate": config.delta_gate, "allow_neg_eigval": config.delta_negative_eigenvalues}
    return fla_config(config, "delta_net", "DeltaNet", own)


def _rules(config: DeltaNetConfig) -> Iterator[Rule]:
    return fla_rules(config, delta_rules(config, "delta", ["g_proj.weight"] if config.delta_gate else []))


FORMATS = (Format("fla", of_type("delta_net"), _to_ours, _to_theirs, _rules),)
