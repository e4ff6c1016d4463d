"""FLA's RetNet checkpoints (`model_type` "retnet") under the zoo's names."""

from __future__ import annotations

from collections.abc import Iterator

from ...kernels.errors import RnnzooError
from ..core.fla import fla_config, fla_fields, fla_rules, fla_values
from ..core.importing import Format, Rule, of_type, renamed
from .configuration_retnet import RetNetConfig

OWN = {"num_heads": 8, "num_kv_heads": None, "expand_k": 1.0, "expand_v": 2.0, "hidden_ratio": 2}
# `fuse_norm` decides under which name the norm's weight is kept. FLA's RetNet ignores `use_short_conv`.
REFUSED = {"use_output_gate": True, "feature_map": None, "elementwise_affine": True, "fuse_norm": True}


def _to_ours(source: dict, shapes: dict) -> RetNetConfig:
    values = fla_values(source, OWN, REFUSED)
    heads = values["num_heads"]
    return RetNetConfig(
        **fla_fields(values),
        num_attention_heads=heads,
        num_key_value_heads=values["num_kv_heads"],
        head_dim=round(values["hidden_size"] * values["expand_k"]) // heads,
        retnet_value_factor=values["expand_v"] / values["expand_k"],
    )


def _to_theirs(config: RetNetConfig) -> dict:
    rope = config.rope_parameters or {}
    if rope.get("rope_theta") != 10000 or rope.get("rope_type", "default") != "default" or len(rope) > 2:
        raise RnnzooError(f"FLA's RetNet rotates with theta 10000 and nothing else, not with rope_parameters={rope}.")
    heads, value_width = config.num_attention_heads, round(config.retnet_value_factor * config.head_dim)
    own = {"num_heads": heads, "num_kv_heads": config.num_key_value_heads} | REFUSED
    own |= {"expand_k": heads * config.head_dim / config.hidden_size}
    own |= {"expand_v": heads * value_width / config.hidden_size}
    return fla_config(config, "retnet", "RetNet", own)


def _rules(config: RetNetConfig) -> Iterator[Rule]:
    names = {f"proj.{name}_proj.weight": f"{name}_proj.weight" for name in "qkvo"}
    names |= {"gate.weight": "g_proj.weight", "norm.weight": "g_norm_swish_gate.weight"}
    yield from fla_rules(config, renamed("", "", names))


FORMATS = (Format("fla", of_type("retnet"), _to_ours, _to_theirs, _rules),)
