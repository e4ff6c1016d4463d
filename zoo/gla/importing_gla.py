"""FLA's GLA checkpoints (`model_type` "gla") under the zoo's names."""

from __future__ import annotations

from collections.abc import Iterator

from ...kernels.errors import RnnzooError
from ..core.fla import fla_config, fla_fields, fla_rules, fla_values
from ..core.importing import Format, Rule, of_type, renamed
from .configuration_gla import GLAConfig

OWN = {"num_heads": 4, "num_kv_heads": None, "expand_k": 0.5, "expand_v": 1.0}
# FLA's GLA reads neither use_gk nor use_gv. `fuse_norm` decides under which name the norm's weight is kept.
REFUSED = {"use_short_conv": False, "use_output_gate": True, "feature_map": None, "clamp_min": None}
REFUSED |= {"elementwise_affine": True, "fuse_norm": True}
# Not in config.json: FLA's models always have these.
FIXED = {"gla_gate_rank": 16, "gla_gate_divisor": 16.0}


def _to_ours(source: dict, shapes: dict) -> GLAConfig:
    values = fla_values(source, OWN, REFUSED)
    hidden, heads = values["hidden_size"], values["num_heads"]
    return GLAConfig(
        **fla_fields(values),
        num_attention_heads=heads,
        num_key_value_heads=values["num_kv_heads"],
        head_dim=round(hidden * values["expand_v"]) // heads,
        gla_key_width=round(hidden * values["expand_k"]) // heads,
        **FIXED,
    )


def _to_theirs(config: GLAConfig) -> dict:
    for name, only in FIXED.items():
        if getattr(config, name) != only:
            raise RnnzooError(f"FLA's GLA has {name}={only} always, not {getattr(config, name)}.")
    heads = config.num_attention_heads
    own = {"num_heads": heads, "num_kv_heads": config.num_key_value_heads} | REFUSED
    own |= {"expand_k": heads * config.gla_key_width / config.hidden_size}
    own |= {"expand_v": heads * config.head_dim / config.hidden_size}
    return fla_config(config, "gla", "GLA", own)


def _rules(config: GLAConfig) -> Iterator[Rule]:
    names = {f"proj.{name}_proj.weight": f"{name}_proj.weight" for name in "qkvo"}
    names |= {"forget_down.weight": "gk_proj.0.weight"}
    names |= {f"forget_up.{kind}": f"gk_proj.1.{kind}" for kind in ("weight", "bias")}
    names |= {"output_gate.weight": "g_proj.weight", "norm.weight": "g_norm_swish_gate.weight"}
    yield from fla_rules(config, renamed("", "", names))


FORMATS = (Format("fla", of_type("gla"), _to_ours, _to_theirs, _rules),)
