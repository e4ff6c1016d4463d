"""transformers' Llama, Mistral, Qwen2 and Qwen3 checkpoints under the zoo's names."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import AutoConfig

from ...kernels.errors import RnnzooError
from ..core.importing import SAME, Format, Rule, of_type, renamed
from .configuration_transformer import TransformerConfig

NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
FIELDS = (*SAME, "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act")
FIELDS += ("max_position_embeddings", "rms_norm_eps", "rope_parameters")
ATTENTION = ("full_attention", "transformer", "sliding_attention")


def _to_ours(source: dict, shapes: dict) -> TransformerConfig:
    kind = source["model_type"]
    theirs = AutoConfig.for_model(**source)  # fills in defaults, and reads what older versions wrote
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * theirs.num_hidden_layers
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    bias = kind == "qwen2" or getattr(theirs, "attention_bias", False)
    return TransformerConfig(
        **{name: getattr(theirs, name) for name in FIELDS},
        head_dim=head_dim,
        sliding_window=window,
        layer_types=["transformer" if name == "full_attention" else name for name in types],
        attention_bias=bias,
        attention_output_bias=bias and kind != "qwen2",
        mlp_bias=getattr(theirs, "mlp_bias", False),
        qk_norm=kind == "qwen3",
    )


def _to_theirs(config: TransformerConfig) -> dict:
    kind = _kind(config)
    sliding = [name == "sliding_attention" for name in config.layer_types]
    fields = {name: getattr(config, name) for name in FIELDS} | {"head_dim": config.head_dim}
    if kind == "llama":
        fields |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    elif kind == "mistral":
        fields |= {"sliding_window": config.sliding_window}
    else:
        fields |= {"layer_types": ["sliding_attention" if s else "full_attention" for s in sliding]}
        fields |= {"use_sliding_window": any(sliding), "sliding_window": config.sliding_window}
        fields |= {"attention_bias": config.attention_bias} if kind == "qwen3" else {}
    dtype = str(config.dtype).removeprefix("torch.")
    return {"architectures": [f"{NAMES[kind]}ForCausalLM"], "model_type": kind} | fields | {"dtype": dtype}


def _kind(config: TransformerConfig) -> str:
    """The model_type that can express a configuration."""
    plain = {"norm_type": "rms", "channel_mixer": "mlp", "mlp_type": "gated", "parallel_residual": False}
    plain |= {"embedding_norm": False, "embedding_scale": None, "logit_cap": None}
    other = [f"{name}={getattr(config, name)!r}" for name, value in plain.items() if getattr(config, name) != value]
    other += [name for name in dict.fromkeys(config.layer_types) if name not in ATTENTION]
    other += [] if config.intermediate_size else ["blocks without an MLP"]
    if other:
        raise RnnzooError(f"transformers' Llama, Mistral, Qwen2 and Qwen3 have no {', '.join(other)}.")
    sliding = [name == "sliding_attention" for name in config.layer_types]
    biases = config.attention_bias, config.attention_output_bias, config.mlp_bias
    if config.qk_norm and biases in ((False, False, False), (True, True, False)):
        return "qwen3"
    if not config.qk_norm and biases == (True, False, False):
        return "qwen2"
    if not config.qk_norm and all(sliding) and not any(biases):
        return "mistral"
    if not config.qk_norm and not any(sliding) and biases[0] == biases[1]:
        return "llama"
    raise RnnzooError(
        "None of Llama, Mistral, Qwen2 and Qwen3 combines these biases, windows and norms: attention_bias, "
        f"attention_output_bias, mlp_bias = {biases}, qk_norm={config.qk_norm}, layer_types={config.layer_types}."
    )


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield from renamed("", "", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
    kinds = ["weight"] + (["bias"] if config.attention_bias else [])
    attention = [f"{name}_proj.{kind}" for kind in kinds for name in "qkv"] + ["o_proj.weight"]
    attention += ["o_proj.bias"] if config.attention_output_bias else []
    attention += ["q_norm.weight", "k_norm.weight"] if config.qk_norm else []
    mlp = [f"{name}_proj.weight" for name in ("gate", "up", "down")]
    mlp += [name.replace("weight", "bias") for name in mlp] if config.mlp_bias else []
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        yield from renamed(f"{layer}mixer.proj.", f"{layer}self_attn.", attention)
        yield from renamed(f"{layer}mlp.", f"{layer}mlp.", mlp)
        yield from renamed(layer, layer, norms)


FORMATS = (Format("transformers", of_type(*NAMES), _to_ours, _to_theirs, _rules, ignored=r"rotary_emb\.inv_freq$"),)
