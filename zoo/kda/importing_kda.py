"""Kimi Delta Attention checkpoints: flash-linear-attention's ("kda"), and Kimi Linear without experts."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ...kernels.errors import RnnzooError
from ..core.fla import delta_rules, delta_settings, fla_config, fla_fields, fla_rules, fla_values
from ..core.importing import Format, Rule, expect_fields, of_type, renamed
from .configuration_kda import KDAConfig

KINDS = {"linear_attention": "kda", "full_attention": "kda.attention"}

# FLA -----------------------------------------------------------------------------------------------------------------

FLA = {"expand_v": 1.0, "head_dim": 128, "num_heads": 16, "num_v_heads": None, "conv_size": 4}
FLA |= {"allow_neg_eigval": False}
FLA_ONLY = {"use_short_conv": True, "safe_gate": False, "lower_bound": None}


def _fla_to_ours(source: dict, shapes: dict) -> KDAConfig:
    values = fla_values(source, FLA, FLA_ONLY)
    return KDAConfig(
        **fla_fields(values),
        kda_num_heads=values["num_heads"],
        kda_v_heads=values["num_v_heads"],
        kda_key_dim=values["head_dim"],
        kda_value_dim=int(values["head_dim"] * values["expand_v"]),
        kda_conv_kernel=values["conv_size"],
        kda_gate_bias=True,
        kda_negative_eigenvalues=values["allow_neg_eigval"],
    )


def _ours_to_fla(config: KDAConfig) -> dict:
    expect_fields(config, "FLA's", kda_rank=config.kda_value_dim, kda_gate_bias=True)
    own = delta_settings(config, "kda", grouped=True) | FLA_ONLY
    own |= {"head_dim": config.kda_key_dim, "expand_v": config.kda_value_dim / config.kda_key_dim}
    return fla_config(config, "kda", "KDA", own | {"allow_neg_eigval": config.kda_negative_eigenvalues})


def _fla_rules(config: KDAConfig) -> Iterator[Rule]:
    names = {"A_log": "A_log", "dt_bias": "dt_bias", "g_b_proj.bias": "g_proj.1.bias"}
    names |= {f"{x}_{ours}_proj.weight": f"{x}_proj.{i}.weight" for x in "fg" for i, ours in enumerate("ab")}
    return fla_rules(config, delta_rules(config, "kda", names))


# Kimi Linear ---------------------------------------------------------------------------------------------------------

# transformers leaves out of config.json what equals its defaults, so they are needed here.
KIMI = {
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 163839,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
}
KIMI_OWN = {
    "kv_lora_rank": (512, "mla_rank"),
    "qk_rope_head_dim": (64, "mla_shared_dim"),
    "qk_nope_head_dim": (128, "mla_key_dim"),
    "v_head_dim": (128, "mla_value_dim"),
}
KIMI_ONLY = {"hidden_act": "silu", "attention_bias": False, "q_lora_rank": None, "tie_word_embeddings": False}


def _kimi_to_ours(source: dict, shapes: dict) -> KDAConfig:
    fields = {name: source.get(name, default) for name, default in KIMI.items()}
    fields |= {new: source.get(old, default) for old, (default, new) in KIMI_OWN.items()}
    layers, linear = fields["num_hidden_layers"], source.get("linear_attn_config") or {}
    for name, only in KIMI_ONLY.items():
        if source.get(name, only) != only:
            raise RnnzooError(f"This checkpoint has {name}={source[name]!r}, but only {only!r} can be imported.")
    dense = source.get("first_k_dense_replace", 1)
    kinds = source.get("mlp_layer_types") or ["dense" if i < dense else "sparse" for i in range(layers)]
    if "sparse" in kinds:
        experts = [i for i, kind in enumerate(kinds) if kind == "sparse"]
        raise RnnzooError(
            f"Layers {experts} of this checkpoint are mixtures of experts; only dense MLPs can be imported."
        )
    attention = [i - 1 for i in linear.get("full_attn_layers", ())]  # counted from 1 there
    if not linear:
        attention = [i for i in range(1, layers) if i % 4 == 0]
    types = source.get("layer_types") or [
        "full_attention" if i in attention else "linear_attention" for i in range(layers)
    ]
    width = linear.get("head_dim", source.get("linear_head_dim", 128))
    return KDAConfig(
        **fields,
        kda_num_heads=linear.get("num_heads", source.get("linear_num_heads", 32)),
        kda_key_dim=width,
        kda_value_dim=width,
        kda_conv_kernel=linear.get("short_conv_kernel_size", source.get("linear_conv_kernel_dim", 4)),
        layer_types=[KINDS[kind] for kind in types],
        max_position_embeddings=source.get("model_max_length", source.get("max_position_embeddings", 1048576)),
    )


def _ours_to_kimi(config: KDAConfig) -> dict:
    heads, width = config.kda_num_heads, config.kda_key_dim
    delta = {"kda_k_heads": heads, "kda_v_heads": heads, "kda_value_dim": width, "kda_rank": width}
    delta |= {"kda_conv_activation": "silu", "kda_gate_bias": False, "kda_negative_eigenvalues": False}
    expect_fields(config, "Kimi Linear's", tie_word_embeddings=False, **delta)
    if not set(config.layer_types) <= set(KINDS.values()) or not config.intermediate_size:
        raise RnnzooError(f"Kimi Linear's format has layers of type {' and '.join(KINDS.values())} alone, with an MLP.")
    names = {ours: theirs for theirs, ours in KINDS.items()}
    return (
        {"architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear"}
        | {name: getattr(config, name) for name in KIMI}
        | {old: getattr(config, new) for old, (_, new) in KIMI_OWN.items()}
        | {"linear_num_heads": heads, "linear_head_dim": width, "linear_conv_kernel_dim": config.kda_conv_kernel}
        | {"layer_types": [names[kind] for kind in config.layer_types]}
        | {"num_key_value_heads": config.num_attention_heads, "model_max_length": config.max_position_embeddings}
        | {"mlp_layer_types": ["dense"] * config.num_hidden_layers, "dtype": str(config.dtype).removeprefix("torch.")}
        | KIMI_ONLY
    )


def _kimi_rules(mlp: str, config: KDAConfig) -> Iterator[Rule]:
    yield from renamed("", "", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
    block = {f"mlp.{part}_proj.weight": f"{mlp}.{part}_proj.weight" for part in ("gate", "up", "down")}
    block |= {name: name for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    low_rank = [f"{x}_{y}_proj.weight" for x in "fg" for y in "ab"]
    for i, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{i}."
        yield from renamed(prefix, prefix, block)
        ours, theirs = f"{prefix}mixer.", f"{prefix}self_attn."
        if kind == "kda":
            for rule in delta_rules(config, "kda", [*low_rank, "dt_bias"]):
                names = tuple(ours + name for name in rule.ours), tuple(theirs + name for name in rule.theirs)
                yield Rule(*names, rule.to_ours, rule.to_theirs)
            yield _reshaped(ours + "A_log", theirs + "A_log", (-1,), (1, 1, -1, 1))
        else:
            names = {"q_proj.weight": "q_proj.weight", "o_proj.weight": "o_proj.weight"}
            names |= {"kv_a_proj.weight": "kv_a_proj_with_mqa.weight", "kv_a_norm.weight": "kv_a_layernorm.weight"}
            yield from renamed(ours + "proj.", theirs, names)
            heads = (config.num_attention_heads, -1, config.mla_rank)
            yield _reshaped(ours + "proj.kv_b_weight", theirs + "kv_b_proj.weight", heads, (-1, config.mla_rank))


def _reshaped(ours: str, theirs: str, our_shape: tuple[int, ...], their_shape: tuple[int, ...]) -> Rule:
    return Rule((ours,), (theirs,), lambda x: (x.reshape(our_shape),), lambda x: (x.reshape(their_shape),))


def _recognises(mlp: str, config: dict, shapes: dict) -> bool:
    return config.get("model_type") == "kimi_linear" and any(f".{mlp}.down_proj." in name for name in shapes)


# transformers writes every MLP under the name that the authors' code has for mixtures of experts alone, and reads both.
FORMATS = (
    Format("fla", of_type("kda"), _fla_to_ours, _ours_to_fla, _fla_rules),
    *(
        Format(
            name, functools.partial(_recognises, mlp), _kimi_to_ours, _ours_to_kimi, functools.partial(_kimi_rules, mlp)
        )
        for name, mlp in (("transformers", "block_sparse_moe"), ("moonshot", "mlp"))
    ),
)
