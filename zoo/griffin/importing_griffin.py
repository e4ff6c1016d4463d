"""transformers' RecurrentGemma checkpoints (`model_type` "recurrent_gemma") under the zoo's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...kernels.errors import RnnzooError
from ..core.importing import Format, Rule, of_type, renamed
from .configuration_griffin import GriffinConfig, normalizer

# transformers' RecurrentGemmaConfig leaves out of config.json what equals its defaults, so they are needed here.
DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 26,
    "vocab_size": 256000,
    "hidden_size": 2560,
    "intermediate_size": 7680,
    "num_attention_heads": 10,
    "num_key_value_heads": None,
    "lru_width": None,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": None,
    "rope_theta": 10000.0,  # here and in the next, settings of older files
    "partial_rotary_factor": 0.5,
    "block_types": ["recurrent", "recurrent", "attention"],
    "attention_bias": False,
    "w_init_variance_scale": 0.01,
    "tie_word_embeddings": True,
}
FIELDS = ("num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "rms_norm_eps", "pad_token_id")
FIELDS += ("eos_token_id", "bos_token_id", "attention_bias", "tie_word_embeddings")
RENAMED = {"attention_window_size": "sliding_window", "conv1d_width": "rglru_conv_kernel"}
RENAMED |= {"logits_soft_cap": "logit_cap", "w_init_variance_scale": "rglru_init_variance"}
KINDS = {"recurrent": "griffin", "attention": "sliding_attention"}


def _to_ours(source: dict, shapes: dict) -> GriffinConfig:
    values = DEFAULTS | {key: value for key, value in source.items() if key in DEFAULTS}
    heads, width, layers = values["num_attention_heads"], values["hidden_size"], values["num_hidden_layers"]
    rope = {"rope_type": "default"} | {name: values[name] for name in ("rope_theta", "partial_rotary_factor")}
    rope |= values["rope_parameters"] or {}
    if rope["rope_type"] != "default":
        raise RnnzooError(
            f"RecurrentGemma rotates without scaling, but this checkpoint asks for {rope['rope_type']!r}."
        )
    pattern = [KINDS[kind] for kind in values["block_types"]]
    fields = {name: values[name] for name in FIELDS} | {new: values[old] for old, new in RENAMED.items()}
    return GriffinConfig(
        **fields,
        layer_types=[pattern[i % len(pattern)] for i in range(layers)],
        num_key_value_heads=values["num_key_value_heads"] or heads,
        head_dim=width // heads,
        intermediate_size=values["intermediate_size"] // 2,
        rglru_width=values["lru_width"] or width,
        rglru_blocks=heads,
        hidden_act=values["hidden_activation"],
        rglru_act=values["hidden_activation"],
        rope_parameters=rope,
    )


def _to_theirs(config: GriffinConfig) -> dict:
    heads = config.num_attention_heads
    required = {"channel_mixer": "mlp", "mlp_type": "gated", "mlp_bias": True, "norm_type": "rms_offset"}
    required |= dict.fromkeys(("embedding_norm", "parallel_residual", "qk_norm"), False)
    required |= {"embedding_scale": normalizer(config.hidden_size), "head_dim": config.hidden_size // heads}
    required |= {"rglru_act": config.hidden_act, "rglru_blocks": heads}
    if "sliding_attention" in config.layer_types:
        required["attention_output_bias"] = True
    for name, only in required.items():
        if getattr(config, name) != only:
            raise RnnzooError(f"RecurrentGemma has {name}={only!r}, but this model {getattr(config, name)!r}.")
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    if not set(config.layer_types) <= set(kinds) or not config.intermediate_size or config.logit_cap is None:
        raise RnnzooError(
            "RecurrentGemma has layers of griffin and sliding_attention alone, MLPs in all, and a bound of the logits."
        )
    return (
        {"architectures": ["RecurrentGemmaForCausalLM"], "model_type": "recurrent_gemma"}
        | {name: getattr(config, name) for name in FIELDS}
        | {old: getattr(config, new) for old, new in RENAMED.items()}
        | {"num_key_value_heads": config.num_key_value_heads, "intermediate_size": 2 * config.intermediate_size}
        | {"lru_width": config.rglru_width, "hidden_activation": config.hidden_act}
        | {"block_types": [kinds[kind] for kind in config.layer_types], "rope_parameters": config.rope_parameters}
        | {"dtype": str(config.dtype).removeprefix("torch.")}
    )


def _rules(config: GriffinConfig) -> Iterator[Rule]:
    yield Rule(("model.embed_tokens.weight",), ("model.embed_tokens.weight",))
    yield Rule(("model.norm.weight",), ("model.final_norm.weight",))
    yield Rule(("lm_head.weight",), ("lm_head.weight",))
    around = {"input_layernorm.weight": "temporal_pre_norm.weight"}
    around |= {"post_attention_layernorm.weight": "channel_pre_norm.weight"}
    parts = [f"{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in ("weight", "bias")]
    around |= {f"mlp.{part}": f"mlp_block.{part}" for part in parts}
    gates = ["recurrent_param"]
    gates += [f"{gate}_gate_{kind}" for gate in ("input", "recurrent") for kind in ("weight", "bias")]
    recurrent = [
        f"{part}.{kind}" for part in ("linear_x", "linear_y", "linear_out", "conv_1d") for kind in ("weight", "bias")
    ]
    recurrent += [f"rg_lru.{name}" for name in gates]
    attention = [f"{part}_proj.weight" for part in "qkvo"] + ["o_proj.bias"]
    attention += [f"{part}_proj.bias" for part in "qkv"] if config.attention_bias else []
    for i, kind in enumerate(config.layer_types or ()):
        prefix = f"model.layers.{i}."
        yield from renamed(prefix, prefix, around)
        if kind == "griffin":
            yield from renamed(f"{prefix}mixer.", f"{prefix}temporal_block.", recurrent)
        else:
            yield from renamed(f"{prefix}mixer.proj.", f"{prefix}temporal_block.", attention)


FORMATS = (Format("transformers", of_type("recurrent_gemma"), _to_ours, _to_theirs, _rules),)
