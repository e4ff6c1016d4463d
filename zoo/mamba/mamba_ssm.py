"""What the checkpoints of the authors' mamba_ssm package have in common: Mamba and Mamba-2.

Their config.json names the layer in `ssm_cfg`; the epsilon of all norms is fixed; weights are in pytorch_model.bin.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...kernels.errors import RnnzooError
from ..core.configuration import RecurrentConfig
from ..core.importing import Rule, renamed

FILE = "pytorch_model.bin"
EPSILON = 1e-5
EMBEDDING = "backbone.embedding.weight"


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
    """Their config.json.

    Raises:
        RnnzooError: the format cannot express this.
    """
    if config.rms_norm_eps != EPSILON or config.norm_type == "rms_offset":
        raise RnnzooError(f"mamba_ssm has RMS norms or layer norms with an epsilon of {EPSILON} alone.")
    if len(set(config.layer_types)) != 1 or config.intermediate_size:
        raise RnnzooError("The mamba_ssm format cannot express other layers or MLPs.")
    if config.attention_bias != config.attention_output_bias:
        raise RnnzooError("mamba_ssm has biases on both projections or on none.")
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
