"""RWKV-7 checkpoints of the authors (`.pth`) and of FLA (`model_type` "rwkv7") under the zoo's names."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...kernels.errors import RnnzooError
from ..core.importing import Format, Rule, of_type, renamed
from ..core.rwkv_files import (
    FLA,
    PTH_HEADS,
    fla_fields,
    fla_values,
    head_fields,
    model_rules,
    pth_format,
    pth_rules,
    stacked,
    transposed,
    vector,
)
from .configuration_rwkv7 import RWKV7Config

LIMITS = {"rwkv7_value_residual": True}
FUNCTIONS = {"decay": "w", "rate": "a", "share": "v", "gate": "g"}
MIX = [f"x_{name}" for name in "rwkvag"]


def _functions(layer: int) -> dict[str, str]:
    """The low-rank functions of a layer: the first has no value residual."""
    return {ours: theirs for ours, theirs in FUNCTIONS.items() if layer or ours != "share"}


# The authors' -------------------------------------------------------------------------------------------------------

PTH_SAME = {"bonus": "r_k"} | PTH_HEADS


def _pth_mixer(layer: int) -> Iterator[Rule]:
    yield from renamed("", "", PTH_SAME)
    yield stacked("mix", MIX)
    yield vector("removal", "k_k")
    yield vector("replacement", "k_a")
    for ours, theirs in _functions(layer).items():
        yield transposed(f"{ours}.down.weight", f"{theirs}1")
        yield transposed(f"{ours}.up.weight", f"{theirs}2")
        if ours != "gate":
            yield vector(f"{ours}.up.bias", f"{theirs}0")


def _pth_to_ours(source: dict, shapes: dict) -> RWKV7Config:
    last = max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    ranks = {
        # A model of one layer has no value residual, and then the rank does not matter.
        f"rwkv7_{name}_rank": shapes.get(f"blocks.{last}.att.{theirs}1", (0, None))[1]
        for name, theirs in (("decay", "w"), ("rate", "a"), ("value", "v"), ("gate", "g"))
    }
    return RWKV7Config(**head_fields(shapes, "r_k"), **ranks)


def _pth_rules(config: RWKV7Config) -> Iterator[Rule]:
    return pth_rules(config, _pth_mixer, {"mix_k": "x_k"})


# FLA's --------------------------------------------------------------------------------------------------------------

FLA_OWN = {"hidden_ratio": 4, "head_dim": 64, "num_heads": None, "value_dim": None}
FLA_OWN |= {"decay_low_rank_dim": 64, "gate_low_rank_dim": 128, "a_low_rank_dim": 64, "v_low_rank_dim": 16}
FLA_RANKS = {"decay": "decay", "gate": "gate", "a": "rate", "v": "value"}
FLA_SAME = {
    "removal": "k_k",
    "replacement": "k_a",
    "bonus": "r_k",
    "norm.weight": "g_norm.weight",
    "norm.bias": "g_norm.bias",
    "proj.q_proj.weight": "r_proj.weight",
    "proj.k_proj.weight": "k_proj.weight",
    "proj.v_proj.weight": "v_proj.weight",
    "proj.o_proj.weight": "o_proj.weight",
}


def _fla_mixer(layer: int) -> Iterator[Rule]:
    yield from renamed("", "", FLA_SAME)
    yield stacked("mix", MIX)
    for ours, theirs in _functions(layer).items():
        parts = {"down.weight": "0.weight", "up.weight": "2.weight"}
        parts |= {} if ours == "gate" else {"up.bias": "2.bias"}
        yield from renamed(f"{ours}.", f"{theirs}_lora.lora.", parts)


def _fla_to_ours(source: dict, shapes: dict) -> RWKV7Config:
    fields, values = fla_fields(source, FLA_OWN)
    width = values["hidden_size"]
    # The number of heads counts only where the other of the two is null.
    head_dim = values["head_dim"] or width // values["num_heads"]
    value_dim = values["value_dim"]
    if value_dim is not None and set(value_dim if isinstance(value_dim, list) else [value_dim]) != {width}:
        raise RnnzooError(f"This checkpoint has value_dim={value_dim!r}, but only {width}, the width, can be imported.")
    ranks = {f"rwkv7_{ours}_rank": values[f"{theirs}_low_rank_dim"] for theirs, ours in FLA_RANKS.items()}
    eps = head_dim * values["norm_eps"]
    return RWKV7Config(**fields, **ranks, num_attention_heads=width // head_dim, head_dim=head_dim, rwkv_group_eps=eps)


def _fla_to_theirs(config: RWKV7Config) -> dict:
    heads, width = config.num_attention_heads, config.head_dim
    if heads * width != config.hidden_size:
        raise RnnzooError(f"The fla format has heads that fill hidden_size, but here {heads} have {width} channels.")
    if not math.isclose(config.rwkv_group_eps, width * config.rms_norm_eps):
        raise RnnzooError(
            f"The fla format has rwkv_group_eps = head_dim * rms_norm_eps, but here it is {config.rwkv_group_eps}."
        )
    ranks = {f"{theirs}_low_rank_dim": getattr(config, f"rwkv7_{ours}_rank") for theirs, ours in FLA_RANKS.items()}
    return fla_values(config, "RWKV7", ranks | {"head_dim": width, "num_heads": heads}, LIMITS)


def _fla_rules(config: RWKV7Config) -> Iterator[Rule]:
    channel_mixer = renamed("", "", {"mix_k": "x_k", "key.weight": "key.weight", "value.weight": "value.weight"})
    return model_rules(config, FLA, _fla_mixer, channel_mixer)


FORMATS = (
    pth_format(
        "r_k",
        "time_decay",
        _pth_to_ours,
        _pth_rules,
        LIMITS | {"rwkv_group_eps": 64e-5},
        ignored=r"^blocks\.0\.att\.v[012]$",  # written by the training code, used by nobody
    ),
    Format("fla", of_type("rwkv7"), _fla_to_ours, _fla_to_theirs, _fla_rules),
)
