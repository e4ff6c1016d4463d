"""What a student's parameters are to a stage that trains: the teacher's or new, in which kind of layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from ...zoo.core.registry import ATTENTION_TYPES, mixer_class
from ...zoo.core.sizes import architecture_config, causal_lm_class

__all__ = ["anything_new", "decay_names", "parts_of"]

WRAPPERS = re.compile(r"\b(_checkpoint_wrapped_module|base_layer)\.")  # of activation checkpointing, and of LoRA


def parts_of(student: Any) -> dict[str, str]:
    """Every parameter's name -> whose learning rate it has (`TrainedStage.rate`).

    "new" in converted layers, where the mixer did not get it from the teacher (`Mixer.filled_from_attention`), and in
    what these layers share; the others there are "mixers"; kept layers are "attention", and all else is the "rest".
    """
    parts = {name: "new" if name.startswith("model.shared.") else "rest" for name, _ in student.named_parameters()}
    filled: dict[Any, frozenset[str]] = {}
    for kind, number, names in _by_mixer(student):
        layer = kind, frozenset(names)  # layers of a kind with the same parameters are filled alike
        if names and kind not in ATTENTION_TYPES and layer not in filled:
            filled[layer] = mixer_class(kind).filled_from_attention(student.config, number)
        for own, name in names.items():
            if kind in ATTENTION_TYPES:
                parts[name] = "attention"
            else:
                parts[name] = "mixers" if own in filled[layer] or ".lora_" in own else "new"
    return parts


def decay_names(student: Any) -> set[str]:
    """Names of the parameters that decide how fast converted layers forget (`Mixer.decay_parameters`)."""
    found = set()
    for kind, _, names in _by_mixer(student):
        found |= {name for own, name in names.items() if own.startswith(mixer_class(kind).decay_parameters)}
    return found


def anything_new(student: str) -> bool:
    """Whether a mixer of usual settings has parameters that do not come from a teacher."""
    cls, heads = architecture_config(student), {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    fields = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "layer_types": [student]}
    with torch.device("meta"):
        model = causal_lm_class(student)(cls(**(fields | heads | cls.student_fields(2, 2, 8))))
    return "new" in parts_of(model).values()


def _by_mixer(student: Any) -> Iterator[tuple[str, int, dict[str, str]]]:
    """For every layer its type, number, and {parameter's name in the mixer: name in the student}."""
    layers: list[dict[str, str]] = [{} for _ in student.config.layer_types]
    for name, _ in student.named_parameters():
        if found := re.fullmatch(r"model\.layers\.(\d+)\.mixer\.(.*)", WRAPPERS.sub("", name)):
            layers[int(found[1])][found[2]] = name
    for number, (kind, names) in enumerate(zip(student.config.layer_types, layers, strict=True)):
        yield kind, number, names
