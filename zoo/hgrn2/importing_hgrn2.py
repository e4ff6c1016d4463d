"""HGRN2 checkpoints of flash-linear-attention (`model_type` "hgrn2") under the zoo's names."""

from __future__ import annotations

from collections.abc import Iterator

from ...kernels.errors import RnnzooError
from ..core.fla import fla_config, fla_fields, fla_rules, fla_values
from ..core.importing import Format, Rule, of_type, renamed
from .configuration_hgrn2 import HGRN2Config

OWN = {"num_heads": None, "expand_ratio": 128, "use_lower_bound": True}


def _to_ours(source: dict, shapes: dict) -> HGRN2Config:
    values = fla_values(source, OWN, {"use_short_conv": False, "elementwise_affine": True})
    width = values["hidden_size"]
    key_dim = values["expand_ratio"] or width // values["num_heads"]
    if width % key_dim:
        raise RnnzooError(f"expand_ratio ({key_dim}) does not divide hidden_size ({width}).")
    return HGRN2Config(**fla_fields(values), hgrn2_key_dim=key_dim, hgrn2_lower_bounds=values["use_lower_bound"])


def _to_theirs(config: HGRN2Config) -> dict:
    heads, key_dim = config.hgrn2_num_heads, config.hgrn2_key_dim
    if heads != config.hgrn2_kv_heads or heads * key_dim != config.hidden_size or key_dim != config.hgrn2_value_dim:
        raise RnnzooError("FLA's HGRN2 has heads that fill hidden_size, as many of gates as of queries.")
    own = {"num_heads": heads, "expand_ratio": key_dim, "use_lower_bound": config.hgrn2_lower_bounds}
    return fla_config(config, "hgrn2", "HGRN2", own)


def _rules(config: HGRN2Config) -> Iterator[Rule]:
    # The zoo keeps the matrix of the keys, 1 - f; theirs is that of f.
    gate = Rule(("proj.k_proj.weight",), ("f_proj.weight",), lambda w: (-w,), lambda w: (-w,))
    names = {"q": "q", "v": "i", "o": "o"}
    names = {f"proj.{ours}_proj.weight": f"{theirs}_proj.weight" for ours, theirs in names.items()}
    yield from fla_rules(config, [gate, *renamed("", "", names | {"norm.weight": "g_norm.weight"})])
    if config.hgrn2_lower_bounds and config.num_hidden_layers > 1:
        yield Rule(("model.shared.hgrn2.logits",), ("model.lower_bounds",))


# Bounds of a model of one layer are without effect.
FORMATS = (Format("fla", of_type("hgrn2"), _to_ours, _to_theirs, _rules, ignored=r"^model\.lower_bounds$"),)
