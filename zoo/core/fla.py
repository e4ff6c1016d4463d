"""What the checkpoints of flash-linear-attention have in common, whatever the mixer: settings and tensor names.

Facts of release 0.6: a model has `embeddings`, `layers.N.attn_norm`, `.attn`, `.mlp_norm`, `.mlp`, and `norm`; its
config.json may leave out what equals a default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...kernels.errors import RnnzooError
from .configuration import RecurrentConfig
from .importing import SAME, Rule, expect_fields, joined, renamed

__all__ = ["DEFAULTS", "delta_rules", "delta_settings", "fla_config", "fla_fields", "fla_rules", "fla_values"]

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn": None,
    "attnres_block_size": None,
}
FLA_SAME = (*SAME, "max_position_embeddings")


def fla_values(source: Mapping[str, Any], own: Mapping[str, Any], refused: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a model, defaults filled in.

    Args:
        source: config.json. own: settings of the architecture and their defaults (others than `DEFAULTS` too).
        refused: settings that must have this value, because our mixer knows no other.
    Raises:
        RnnzooError: a setting that the zoo cannot express.
    """
    values = DEFAULTS | own | refused
    values |= {name: source[name] for name in values if name in source}
    for name, only in ({"attn": None, "attnres_block_size": None} | dict(refused)).items():
        if values[name] != only and not (only is None and not values[name]):
            raise RnnzooError(f"This checkpoint has {name}={values[name]!r}, but only {name}={only!r} can be imported.")
    if values["hidden_act"] not in ("swish", "silu"):
        raise RnnzooError(f"This checkpoint has hidden_act={values['hidden_act']!r}, but its MLP is defined with SiLU.")
    return values


def fla_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `RecurrentConfig` for the settings of `fla_values`."""
    width = values["intermediate_size"]
    if width is None:
        width = -(-int(values["hidden_size"] * (values["hidden_ratio"] or 4) * 2 / 3) // 256) * 256
    return {name: values[name] for name in FLA_SAME} | {"intermediate_size": width, "rms_norm_eps": values["norm_eps"]}


def fla_config(config: RecurrentConfig, model_type: str, class_name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose layers are all of one kind.

    Args:
        own: settings of the architecture. class_name: without "ForCausalLM".
    Raises:
        RnnzooError: the format cannot express the configuration.
    """
    expect_fields(config, "FLA's")
    if set(config.layer_types or ()) != {config.mixer} or not config.intermediate_size:
        raise RnnzooError("FLA's format has neither layers of other kinds nor blocks without an MLP.")
    return (
        {"architectures": [f"{class_name}ForCausalLM"], "model_type": model_type, "hidden_act": "swish"}
        | {name: getattr(config, name) for name in FLA_SAME}
        | {"intermediate_size": config.intermediate_size, "norm_eps": config.rms_norm_eps}
        | dict(own)
        | {"dtype": str(config.dtype).removeprefix("torch.")}
    )


def fla_rules(config: RecurrentConfig, mixer: Iterable[Rule]) -> Iterator[Rule]:
    """Rules of a whole model.

    Args:
        mixer: those of one layer's mixer, with names below `mixer.` and `attn.`.
    """
    yield Rule(("model.embed_tokens.weight",), ("model.embeddings.weight",))
    yield Rule(("model.norm.weight",), ("model.norm.weight",))
    yield Rule(("lm_head.weight",), ("lm_head.weight",))
    names = {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "mlp_norm.weight"}
    names |= {f"mlp.{part}_proj.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    rules = list(mixer)
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        yield from renamed(prefix, prefix, names)
        for rule in rules:
            ours = tuple(f"{prefix}mixer.{name}" for name in rule.ours)
            yield Rule(ours, tuple(f"{prefix}attn.{name}" for name in rule.theirs), rule.to_ours, rule.to_theirs)


def delta_settings(config: RecurrentConfig, prefix: str, grouped: bool) -> dict[str, Any]:
    """The settings of a mixer of `core.delta` that its layers have in common.

    Args:
        grouped: the format knows more heads of values than of queries and keys.
    Raises:
        RnnzooError: heads or an activation that the format cannot express.
    """
    names = ("num_heads", "k_heads", "v_heads", "conv_kernel", "conv_activation")
    q_heads, k_heads, v_heads, taps, activation = (getattr(config, f"{prefix}_{name}") for name in names)
    if activation != "silu" or q_heads != k_heads or (v_heads != k_heads and not (grouped and v_heads > k_heads)):
        raise RnnzooError("FLA's format has SiLU after the convolutions, and a key for each query (no students).")
    return {"num_heads": q_heads, "conv_size": taps, "use_short_conv": True} | (
        {"num_v_heads": v_heads} if grouped else {}
    )


def delta_rules(config: RecurrentConfig, prefix: str, names: Iterable[str] | Mapping[str, str]) -> Iterator[Rule]:
    """Rules of a mixer of `core.delta`; `names` are those that its architecture adds, as for `renamed`."""
    k_width = getattr(config, f"{prefix}_k_heads") * getattr(config, f"{prefix}_key_dim")
    v_width = getattr(config, f"{prefix}_v_heads") * getattr(config, f"{prefix}_value_dim")
    yield joined("proj.conv1d.weight", [f"{x}_conv1d.weight" for x in "qkv"], [k_width, k_width, v_width])
    yield from renamed("proj.", "", [f"{x}_proj.weight" for x in "qkvo"])
    yield from renamed("", "", {"b_proj.weight": "b_proj.weight", "norm.weight": "o_norm.weight"})
    yield from renamed("", "", names)
