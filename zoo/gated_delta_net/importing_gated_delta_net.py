"""Gated DeltaNet checkpoints: flash-linear-attention's, and transformers' Qwen3-Next without experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels.errors import RnnzooError
from ..core.fla import delta_rules, delta_settings, fla_config, fla_fields, fla_rules, fla_values
from ..core.importing import Format, Rule, expect_fields, of_type, renamed
from .configuration_gated_delta_net import GatedDeltaNetConfig

KINDS = {"linear_attention": "gated_delta_net", "full_attention": "gated_delta_net.attention"}

# FLA -----------------------------------------------------------------------------------------------------------------

FLA = {"expand_v": 2.0, "head_dim": 256, "num_heads": 6, "num_v_heads": None, "conv_size": 4, "num_hidden_layers": 21}
FLA |= {"use_gate": True, "output_gate_activation": "swish", "allow_neg_eigval": False}


def _fla_to_ours(source: dict, shapes: dict) -> GatedDeltaNetConfig:
    values = fla_values(source, FLA, {"use_short_conv": True})
    return GatedDeltaNetConfig(
        **fla_fields(values),
        gdn_num_heads=values["num_heads"],
        gdn_v_heads=values["num_v_heads"],
        gdn_key_dim=values["head_dim"],
        gdn_value_dim=int(values["head_dim"] * values["expand_v"]),
        gdn_conv_kernel=values["conv_size"],
        gdn_gate=values["use_gate"],
        gdn_gate_activation=values["output_gate_activation"].replace("swish", "silu"),
        gdn_negative_eigenvalues=values["allow_neg_eigval"],
    )


def _ours_to_fla(config: GatedDeltaNetConfig) -> dict:
    own = delta_settings(config, "gdn", grouped=True)
    own |= {"head_dim": config.gdn_key_dim, "expand_v": config.gdn_value_dim / config.gdn_key_dim}
    own |= {"use_gate": config.gdn_gate, "output_gate_activation": config.gdn_gate_activation}
    return fla_config(
        config, "gated_deltanet", "GatedDeltaNet", own | {"allow_neg_eigval": config.gdn_negative_eigenvalues}
    )


def _fla_rules(config: GatedDeltaNetConfig) -> Iterator[Rule]:
    names = ["a_proj.weight", "A_log", "dt_bias", *(["g_proj.weight"] if config.gdn_gate else [])]
    return fla_rules(config, delta_rules(config, "gdn", names))


# Qwen3-Next ----------------------------------------------------------------------------------------------------------

# transformers leaves out of config.json what equals its defaults, so they are needed here.
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN_OWN = {
    "linear_num_key_heads": (16, "gdn_num_heads"),
    "linear_num_value_heads": (32, "gdn_v_heads"),
    "linear_key_head_dim": (128, "gdn_key_dim"),
    "linear_value_head_dim": (128, "gdn_value_dim"),
    "linear_conv_kernel_dim": (4, "gdn_conv_kernel"),
}


def _qwen_to_ours(source: dict, shapes: dict) -> GatedDeltaNetConfig:
    fields = {name: source.get(name, default) for name, default in QWEN.items()}
    layers = fields["num_hidden_layers"]
    dense = set(source.get("mlp_only_layers") or ())
    step = source.get("decoder_sparse_step", 1)
    experts = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
    if experts and source.get("num_experts", 512):
        raise RnnzooError(
            f"Layers {experts} of this checkpoint are mixtures of experts; only dense MLPs can be imported."
        )
    for name, only in (("hidden_act", "silu"), ("attention_bias", False)):
        if source.get(name, only) != only:
            raise RnnzooError(f"This checkpoint has {name}={source[name]!r}, but only {only!r} can be imported.")
    every = source.get("full_attention_interval", 4)
    kinds = source.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)
    ]
    rope = {"rope_type": "default", "rope_theta": source.get("rope_theta", 10000.0)}
    rope |= {"partial_rotary_factor": source.get("partial_rotary_factor", 0.25)}
    rope |= (source.get("rope_scaling") or {}) | (source.get("rope_parameters") or {})
    return GatedDeltaNetConfig(
        **fields,
        **{new: source.get(old, default) for old, (default, new) in QWEN_OWN.items()},
        layer_types=[KINDS[kind] for kind in kinds],
        rope_parameters=rope,
        norm_type="rms_offset",
    )


def _ours_to_qwen(config: GatedDeltaNetConfig) -> dict:
    delta = {"gdn_k_heads": config.gdn_num_heads, "gdn_conv_activation": "silu", "gdn_negative_eigenvalues": False}
    gate = {"gdn_gate": True, "gdn_gate_activation": "silu"}
    expect_fields(config, "Qwen3-Next's", norm_type="rms_offset", **delta, **gate)
    if not set(config.layer_types) <= set(KINDS.values()) or not config.intermediate_size:
        raise RnnzooError(f"Qwen3-Next's format has layers of type {' and '.join(KINDS.values())} alone, with an MLP.")
    names = {ours: theirs for theirs, ours in KINDS.items()}
    rope = {"partial_rotary_factor": 1.0} | config.rope_parameters  # theirs is 0.25 where it is not named
    return (
        {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_act": "silu"}
        | {name: getattr(config, name) for name in QWEN}
        | {old: getattr(config, new) for old, (_, new) in QWEN_OWN.items()}
        | {"layer_types": [names[kind] for kind in config.layer_types], "rope_parameters": rope}
        | {"mlp_only_layers": list(range(config.num_hidden_layers)), "num_experts": 0, "attention_bias": False}
        | {"dtype": str(config.dtype).removeprefix("torch.")}
    )


def _grouped(ours: list[str], theirs: str, groups: int, rows: list[int]) -> Rule:
    """Several matrices of ours that are one of theirs, which has their rows of one head after the other.

    Args:
        groups: heads. rows: of each matrix in a head.
    """

    def split(whole: Tensor) -> list[Tensor]:
        parts = whole.unflatten(0, (groups, -1)).split(rows, 1)
        return [part.flatten(0, 1) for part in parts]

    def join(*parts: Tensor) -> tuple[Tensor]:
        return (torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1),)

    return Rule(tuple(ours), (theirs,), split, join)


def _qwen_rules(config: GatedDeltaNetConfig) -> Iterator[Rule]:
    yield from renamed("", "", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
    key_dim, groups = config.gdn_key_dim, config.gdn_num_heads
    per_key = config.gdn_v_heads // groups
    widths = [key_dim, key_dim, per_key * config.gdn_value_dim, per_key * config.gdn_value_dim]
    block = [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    block += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    for i, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{i}."
        yield from renamed(prefix, prefix, block)
        ours = prefix + "mixer."
        if kind == "gated_delta_net":
            theirs = prefix + "linear_attn."
            matrices = [f"{ours}{name}.weight" for name in ("proj.q_proj", "proj.k_proj", "proj.v_proj", "g_proj")]
            yield _grouped(matrices, theirs + "in_proj_qkvz.weight", groups, widths)
            scalars = [f"{ours}{name}.weight" for name in ("b_proj", "a_proj")]
            yield _grouped(scalars, theirs + "in_proj_ba.weight", groups, [per_key, per_key])
            names = {"proj.conv1d.weight": "conv1d.weight", "proj.o_proj.weight": "out_proj.weight"}
            yield from renamed(ours, theirs, names | {name: name for name in ("norm.weight", "A_log", "dt_bias")})
        else:
            theirs, heads, width = prefix + "self_attn.", config.num_attention_heads, config.head_dim
            matrices = [ours + "proj.q_proj.weight", ours + "gate_proj.weight"]
            yield _grouped(matrices, theirs + "q_proj.weight", heads, [width, width])
            names = [f"{name}.weight" for name in ("k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
            yield from renamed(ours + "proj.", theirs, names)


FORMATS = (
    Format("fla", of_type("gated_deltanet"), _fla_to_ours, _ours_to_fla, _fla_rules),
    # Ignored are the heads that predict further tokens.
    Format("transformers", of_type("qwen3_next"), _qwen_to_ours, _ours_to_qwen, _qwen_rules, ignored=r"^mtp\."),
)
