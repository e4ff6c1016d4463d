"""The authors' RWKV-5 files (`.pth`, version 5.2) under the zoo's names."""

from __future__ import annotations

from collections.abc import Iterator

from ..core.importing import Rule, renamed
from ..core.rwkv_files import PTH_HEADS, head_fields, pth_format, pth_rules, stacked
from .configuration_rwkv5 import RWKV5Config

SAME = {"decay": "time_decay", "bonus": "time_faaaa", "gate.weight": "gate.weight"} | PTH_HEADS


def _attention(layer: int) -> Iterator[Rule]:
    yield from renamed("", "", SAME)
    yield stacked("mix", [f"time_mix_{name}" for name in "rkvg"])


def _to_ours(source: dict, shapes: dict) -> RWKV5Config:
    return RWKV5Config(**head_fields(shapes, "time_faaaa"))


def _rules(config: RWKV5Config) -> Iterator[Rule]:
    return pth_rules(config, _attention, {"mix_k": "time_mix_k", "mix_r": "time_mix_r"})


FORMATS = (pth_format("time_mix_g", "time_maa_w1", _to_ours, _rules, {"rwkv_group_eps": 64e-5}),)
