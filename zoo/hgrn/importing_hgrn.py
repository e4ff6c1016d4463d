"""HGRN checkpoints of flash-linear-attention (`model_type` "hgrn") under the zoo's names."""

from __future__ import annotations

from collections.abc import Iterator

from ...kernels.errors import RnnzooError
from ..core.fla import fla_config, fla_fields, fla_rules, fla_values
from ..core.importing import Format, Rule, joined, of_type, renamed
from .configuration_hgrn import HGRNConfig

OWN = {"expand_ratio": 1, "use_short_conv": False, "conv_size": 4, "use_lower_bound": True}


def _to_ours(source: dict, shapes: dict) -> HGRNConfig:
    values = fla_values(source, OWN, {"elementwise_affine": True})
    expand = values["expand_ratio"]
    if expand != int(expand):
        raise RnnzooError(f"This checkpoint has expand_ratio={expand}; only whole numbers can be imported.")
    return HGRNConfig(
        **fla_fields(values),
        hgrn_expand=int(expand),
        hgrn_conv_kernel=values["conv_size"] if values["use_short_conv"] else 0,
        hgrn_lower_bounds=values["use_lower_bound"],
    )


def _to_theirs(config: HGRNConfig) -> dict:
    taps = config.hgrn_conv_kernel
    own = {"use_short_conv": taps > 0, "conv_size": taps or OWN["conv_size"]}
    own |= {"expand_ratio": config.hgrn_expand, "use_lower_bound": config.hgrn_lower_bounds}
    return fla_config(config, "hgrn", "HGRN", own)


def _rules(config: HGRNConfig) -> Iterator[Rule]:
    names = {f"{part}_proj.weight": f"{part}_proj.weight" for part in "ifgo"} | {"norm.weight": "g_norm.weight"}
    mixer = list(renamed("", "", names))
    if config.hgrn_conv_kernel:
        width = config.hgrn_expand * config.hidden_size
        mixer.append(joined("conv1d.weight", ["i_conv1d.weight", "f_conv1d.weight"], [width, width]))
    yield from fla_rules(config, mixer)
    if config.hgrn_lower_bounds and config.num_hidden_layers > 1:
        yield Rule(("model.shared.hgrn.logits",), ("model.lower_bounds",))


# Bounds of a model of one layer are without effect.
FORMATS = (Format("fla", of_type("hgrn"), _to_ours, _to_theirs, _rules, ignored=r"^model\.lower_bounds$"),)
