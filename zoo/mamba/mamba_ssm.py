"""What the checkpoints of Mamba and Mamba-2 have in common: transformers', and those of the authors' mamba_ssm package.

mamba_ssm's config.json names the layer in `ssm_cfg`; the epsilon of all norms is fixed; weights are in
pytorch_model.bin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ...kernels.errors import RnnzooError
from ..core.configuration import RecurrentConfig
from ..core.importing import SAME, Format, Rule, renamed

FILE = "pytorch_model.bin"
EPSILON = 1e-5
EMBEDDING = "backbone.embedding.weight"
# mamba_ssm's options of a layer.
SSM_CFG = {"expand": "ssm_expand", "d_conv": "ssm_conv_kernel", "conv_bias": "ssm_conv_bias", "bias": "attention_bias"}
SSM_CFG |= {"dt_min": "ssm_time_step_min", "dt_max": "ssm_time_step_max", "dt_init_floor": "ssm_time_step_floor"}
# transformers leaves out of config.json what equals its defaults, so they are needed here.
DEFAULTS = {"layer_norm_epsilon": 1e-5, "bos_token_id": 0, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}
DEFAULTS |= {"hidden_act": "silu", "initializer_range": 0.1}
DEFAULTS |= {"time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4}
RENAMED = {"layer_norm_epsilon": "rms_norm_eps", "conv_kernel": "ssm_conv_kernel", "use_conv_bias": "ssm_conv_bias"}
RENAMED |= {f"time_step_{end}": f"ssm_time_step_{end}" for end in ("min", "max", "floor")}


def from_transformers(source: dict, defaults: dict, names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our fields, and all of transformers' settings. `names`: theirs -> ours.

    Raises:
        RnnzooError: another activation than SiLU.
    """
    values = defaults | {key: value for key, value in source.items() if key in defaults}
    if values["hidden_act"] not in ("silu", "swish"):
        raise RnnzooError(f"Mamba's activation is SiLU, but this checkpoint has hidden_act='{values['hidden_act']}'.")
    fields = {name: values[name] for name in SAME} | {new: values[old] for old, new in names.items()}
    return fields | dict.fromkeys(("attention_bias", "attention_output_bias"), values["use_bias"]), values


def to_transformers(config: RecurrentConfig, model_type: str, class_name: str, names: Mapping[str, str]) -> dict:
    """transformers' config.json. `names` as above; class_name: without "ForCausalLM"."""
    return (
        {"architectures": [f"{class_name}ForCausalLM"], "model_type": model_type, "hidden_act": "silu"}
        | {name: getattr(config, name) for name in SAME}
        | {old: getattr(config, new) for old, new in names.items()}
        | {"use_bias": config.attention_bias, "dtype": str(config.dtype).removeprefix("torch.")}
    )


def authors_format(layer: str, to_ours: Callable, to_theirs: Callable, names: Callable[[Any], Iterable[str]]) -> Format:
    """The format "mamba_ssm" of a layer, "Mamba1" or "Mamba2"; names: of its tensors. The rest as for `Format`."""

    def recognises(config: dict, shapes: dict) -> bool:
        return layer_of(config) == layer

    def all_rules(config: RecurrentConfig) -> Iterator[Rule]:
        return rules(config, names(config))

    return Format("mamba_ssm", recognises, to_ours, to_theirs, all_rules, file=FILE)


def layer_of(config: Mapping[str, Any]) -> str | None:
    """ "Mamba1" or "Mamba2"; None where this is no configuration of mamba_ssm."""
    if not {"d_model", "n_layer"} <= set(config):
        return None
    return (config.get("ssm_cfg") or {}).get("layer", "Mamba1")


def config_fields(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, str]) -> dict:
    """Our fields. `known`: names in `ssm_cfg` -> ours; what is not in it must not be there.

    Raises:
        RnnzooError: attention layers, MLPs or unknown options.
    """
    if config.get("attn_layer_idx") or config.get("d_intermediate"):
        raise RnnzooError("This mamba_ssm checkpoint has attention layers or MLPs, which the importer cannot read.")
    options = dict(config.get("ssm_cfg") or {})
    options.pop("layer", None)
    # Of kernels and of initialisations that are over once there is a checkpoint.
    for name in ("use_fast_path", "chunk_size", "use_mem_eff_path", "dt_init", "dt_scale", "conv_init", "A_init_range"):
        options.pop(name, None)
    if unknown := sorted(set(options) - set(known)):
        raise RnnzooError(f"ssm_cfg of this mamba_ssm checkpoint has {unknown}, which the importer cannot read.")
    bias = options.pop("bias", False)
    return {
        "vocab_size": shapes[EMBEDDING][0],  # padded: more than config's
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "norm_type": "rms" if config.get("rms_norm", True) else "layer",
        "rms_norm_eps": EPSILON,
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "attention_bias": bias,
        "attention_output_bias": bias,
    } | {known[name]: value for name, value in options.items()}


def their_config(config: RecurrentConfig, layer: str, known: Mapping[str, str]) -> dict:
    """Their config.json, of a model of such layers alone.

    Raises:
        RnnzooError: norms that the format cannot express.
    """
    if config.rms_norm_eps != EPSILON or config.norm_type == "rms_offset":
        raise RnnzooError(f"mamba_ssm has RMS norms or layer norms with an epsilon of {EPSILON} alone.")
    options = {name: getattr(config, ours) for name, ours in known.items() if name != "bias"}
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer, "bias": config.attention_bias} | options,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": config.norm_type == "rms",
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,  # the vocabulary is what it is
        "tie_embeddings": config.tie_word_embeddings,
    }


def rules(config: RecurrentConfig, names: Iterable[str], embedding: str = EMBEDDING) -> Iterator[Rule]:
    """All tensors. `names`: of a mixer, as both sides have them. `embedding`: their name of the embeddings."""
    norm = ["weight", "bias"] if config.norm_type == "layer" else ["weight"]
    yield Rule(("model.embed_tokens.weight",), (embedding,))
    yield from renamed("model.norm.", "backbone.norm_f.", norm)
    yield Rule(("lm_head.weight",), ("lm_head.weight",))
    names = list(names)
    for i in range(config.num_hidden_layers):
        yield from renamed(f"model.layers.{i}.mixer.", f"backbone.layers.{i}.mixer.", names)
        yield from renamed(f"model.layers.{i}.input_layernorm.", f"backbone.layers.{i}.norm.", norm)
