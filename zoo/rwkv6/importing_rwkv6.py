"""RWKV-6 checkpoints of the authors (`.pth`) and of FLA (`model_type` "rwkv6") under the zoo's names."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

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
from .configuration_rwkv6 import RWKV6Config

# What these formats have no place for.
LIMITS = {"rwkv6_gate": "silu", "rwkv6_balance": False}

# The authors' -------------------------------------------------------------------------------------------------------

PTH_SAME = {"shift.up": "time_maa_w2", "bonus": "time_faaaa", "gate.weight": "gate.weight"} | PTH_HEADS


def _pth_mixer(layer: int) -> Iterator[Rule]:
    yield from renamed("", "", PTH_SAME)
    yield vector("shift.mix_x", "time_maa_x")
    yield stacked("shift.mix", [f"time_maa_{name}" for name in "wkvrg"])
    yield vector("decay.up.bias", "time_decay")
    yield transposed("shift.down.weight", "time_maa_w1")
    yield transposed("decay.down.weight", "time_decay_w1")
    yield transposed("decay.up.weight", "time_decay_w2")


def _pth_to_ours(source: dict, shapes: dict) -> RWKV6Config:
    return RWKV6Config(
        **head_fields(shapes, "time_faaaa"),
        rwkv6_mix_rank=shapes["blocks.0.att.time_maa_w2"][1],
        rwkv6_decay_rank=shapes["blocks.0.att.time_decay_w1"][1],
    )


def _pth_rules(config: RWKV6Config) -> Iterator[Rule]:
    return pth_rules(config, _pth_mixer, {"mix_k": "time_maa_k", "mix_r": "time_maa_r"})


# FLA's --------------------------------------------------------------------------------------------------------------

FLA_OWN = {"hidden_ratio": 3.5, "expand_k": 0.5, "expand_v": 1.0, "num_heads": 4}
FLA_OWN |= {"proj_low_rank_dim": 32, "gate_low_rank_dim": 64}
FLA_SAME = {
    "shift.mix_x": "x_proj.0.mu",
    "decay.down.weight": "w_proj.linear.lora.0.weight",
    "decay.up.weight": "w_proj.linear.lora.2.weight",
    "decay.up.bias": "w_proj.linear.lora.2.bias",
    "bonus": "bonus",
    "gate.weight": "g_proj.linear.weight",
    "norm.weight": "g_norm.weight",
    "norm.bias": "g_norm.bias",
    "proj.q_proj.weight": "r_proj.linear.weight",
    "proj.k_proj.weight": "k_proj.linear.weight",
    "proj.o_proj.weight": "o_proj.weight",
}
FLA_CHANNEL = {
    "mix_k": "key.mu",
    "mix_r": "receptance.mu",
    "key.weight": "key.linear.weight",
    "receptance.weight": "receptance.linear.weight",
    "value.weight": "value.weight",
}
# FLA's order is r, w, k, v, g, ours w, k, v, r, g.
FROM_FLA, TO_FLA = [1, 2, 3, 0, 4], [3, 0, 1, 2, 4]


def _five(x: Tensor, order: list[int], dim: int) -> Tensor:
    """Puts the five parts of a dimension into another order."""
    return x.unflatten(dim, (5, -1)).index_select(dim, x.new_tensor(order, dtype=int)).flatten(dim, dim + 1)


def _fla_mixer(layer: int) -> Iterator[Rule]:
    yield from renamed("", "", FLA_SAME)
    # The norm of o with epsilon 64 e is that of o / 8 with e, which is FLA's: a power of two changes no bit but scale.
    yield Rule(("proj.v_proj.weight",), ("v_proj.linear.weight",), lambda v: (v * 8,), lambda v: (v / 8,))
    for ours, theirs in (("shift.mix", "x_bias"), ("shift.down.weight", "x_proj.0.linear.weight")):
        yield Rule((ours,), (theirs,), lambda x: (_five(x, FROM_FLA, 0),), lambda x: (_five(x, TO_FLA, 0),))
    yield Rule(
        ("shift.up",),
        ("x_proj.2.weight",),
        lambda x: (_five(x, FROM_FLA, 1).unflatten(1, (5, -1)).permute(1, 2, 0),),
        lambda x: (_five(x.permute(2, 0, 1).flatten(1), TO_FLA, 1),),
    )


def _fla_to_ours(source: dict, shapes: dict) -> RWKV6Config:
    fields, values = fla_fields(source, FLA_OWN)
    width, heads = values["hidden_size"], values["num_heads"]
    return RWKV6Config(
        **fields,
        num_attention_heads=heads,
        head_dim=round(width * values["expand_v"]) // heads,
        rwkv6_key_width=round(width * values["expand_k"]) // heads,
        rwkv6_mix_rank=values["proj_low_rank_dim"],
        rwkv6_decay_rank=values["gate_low_rank_dim"],
        rwkv_group_eps=64 * values["norm_eps"],
    )


def _fla_to_theirs(config: RWKV6Config) -> dict:
    if not math.isclose(config.rwkv_group_eps, 64 * config.rms_norm_eps):
        raise RnnzooError(
            "The fla format has one epsilon for all norms, so rwkv_group_eps must be 64 rms_norm_eps, but they are "
            f"{config.rwkv_group_eps} and {config.rms_norm_eps}."
        )
    heads, width = config.num_attention_heads, config.hidden_size
    own = {"expand_k": heads * config.rwkv6_key_width / width, "expand_v": heads * config.head_dim / width}
    own |= {"proj_low_rank_dim": config.rwkv6_mix_rank, "gate_low_rank_dim": config.rwkv6_decay_rank}
    return fla_values(config, "RWKV6", {"num_heads": heads} | own, LIMITS)


def _fla_rules(config: RWKV6Config) -> Iterator[Rule]:
    return model_rules(config, FLA, _fla_mixer, renamed("", "", FLA_CHANNEL))


FORMATS = (
    pth_format("time_maa_w1", "r_k", _pth_to_ours, _pth_rules, LIMITS | {"rwkv_group_eps": 64e-5}),
    Format("fla", of_type("rwkv6"), _fla_to_ours, _fla_to_theirs, _fla_rules),
)
