"""RWKV checkpoints, the authors' and FLA's: what the generations have in common.

The authors' are single files (`.pth`) with no configuration beside them. Vectors are kept as
(1, 1, D), low-rank matrices to multiply from the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...kernels.errors import RnnzooError
from .configuration import RecurrentConfig
from .fla import DEFAULTS
from .importing import SAME, Format, Rule, renamed

__all__ = [
    "FLA",
    "PTH_HEADS",
    "block_count",
    "fla_fields",
    "fla_values",
    "head_fields",
    "model_rules",
    "plain_fields",
    "pth_format",
    "pth_rules",
    "refuse_unless",
    "stacked",
    "transposed",
    "vector",
]

# What a model of these formats must be; other values have no place in them.
PLAIN: dict[str, Any] = {
    "norm_type": "layer",
    "embedding_norm": True,
    "embedding_scale": None,
    "logit_cap": None,
    "parallel_residual": False,
    "attention_bias": False,
    "attention_output_bias": False,
    "qk_norm": False,
    "temporal_perspectives": 1,
    "rwkv_group_norm": True,
    "rwkv_rotate": False,
}


def refuse_unless(config: RecurrentConfig, format: str, own: Mapping[str, Any]) -> None:
    """Raises RnnzooError where the configuration is not that of a plain RWKV, with the values of `own` besides."""
    name = config.mixer
    for field, only in (PLAIN | {"channel_mixer": name} | dict(own)).items():
        value = getattr(config, field, only)
        if value != only:
            raise RnnzooError(f"The {format} format of {name} has no place for {field}={value!r}.")
    if set(config.layer_types or ()) != {name} or config.num_key_value_heads != config.num_attention_heads:
        raise RnnzooError(f"The {format} format of {name} has neither other layers nor grouped heads.")


def vector(ours: str, theirs: str) -> Rule:
    """Ours (D,), theirs (1, 1, D)."""
    return Rule((ours,), (theirs,), lambda x: (x.flatten(),), lambda x: (x.view(1, 1, -1),))


def stacked(ours: str, theirs: Sequence[str]) -> Rule:
    """Ours (n, D), theirs n vectors (1, 1, D)."""
    return Rule(
        (ours,),
        tuple(theirs),
        lambda *rows: (torch.stack([row.flatten() for row in rows]),),
        lambda whole: [row.view(1, 1, -1) for row in whole],
    )


def transposed(ours: str, theirs: str) -> Rule:
    """A matrix that theirs multiply from the right."""
    return Rule((ours,), (theirs,), lambda x: (x.T,), lambda x: (x.T,))


# Norm and projections of a mixer with heads, in the authors' files.
PTH_HEADS = {
    "norm.weight": "ln_x.weight",
    "norm.bias": "ln_x.bias",
    "proj.q_proj.weight": "receptance.weight",
    "proj.k_proj.weight": "key.weight",
    "proj.v_proj.weight": "value.weight",
    "proj.o_proj.weight": "output.weight",
}


def block_count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """Number of blocks: one more than the largest number after `prefix`."""
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix))


def plain_fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Fields of the configuration that a file's shapes tell. Document end is token 0, as in the authors' data."""
    return {
        "vocab_size": shapes["emb.weight"][0],
        "hidden_size": shapes["emb.weight"][1],
        "num_hidden_layers": block_count(shapes, "blocks."),
        "intermediate_size": shapes["blocks.0.ffn.key.weight"][0],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def head_fields(shapes: Mapping[str, tuple[int, ...]], per_head: str) -> dict[str, Any]:
    """`plain_fields`, and the heads' sizes from the shape (H, d) of a tensor of time mixing."""
    heads, width = shapes[f"blocks.0.att.{per_head}"]
    return plain_fields(shapes) | {"num_attention_heads": heads, "head_dim": width}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a format keeps what surrounds the mixers; names of modules end in a dot."""

    embedding: str
    head: str
    embedding_norm: str
    norm: str
    layers: str
    norms: tuple[str, str]
    mixer: str
    channel_mixer: str


PTH = Layout("emb.weight", "head.weight", "blocks.0.ln0.", "ln_out.", "blocks.", ("ln1.", "ln2."), "att.", "ffn.")
FLA = Layout(
    "model.embeddings.weight",
    "lm_head.weight",
    "model.layers.0.pre_norm.",
    "model.norm.",
    "model.layers.",
    ("attn_norm.", "ffn_norm."),
    "attn.",
    "ffn.",
)


def model_rules(
    config: RecurrentConfig, layout: Layout, mixer: Callable[[int], Iterable[Rule]], channel_mixer: Iterable[Rule]
) -> Iterator[Rule]:
    """Rules of a whole model.

    Args:
        mixer: index of a layer -> the rules of its mixer, with names below both mixers. channel_mixer: likewise.
    """
    yield Rule(("model.embed_tokens.weight",), (layout.embedding,))
    yield Rule(("lm_head.weight",), (layout.head,))
    norms = [("model.embedding_norm.", layout.embedding_norm), ("model.norm.", layout.norm)]
    channel_rules = list(channel_mixer)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}.", f"{layout.layers}{i}."
        own = ("input_layernorm.", "post_attention_layernorm.")
        norms += [(ours + name, theirs + other) for name, other in zip(own, layout.norms, strict=True)]
        yield from _below(f"{ours}mixer.", theirs + layout.mixer, mixer(i))
        yield from _below(f"{ours}mlp.", theirs + layout.channel_mixer, channel_rules)
    for ours, theirs in norms:
        yield from renamed(ours, theirs, ("weight", "bias"))


def _below(ours: str, theirs: str, rules: Iterable[Rule]) -> Iterator[Rule]:
    for rule in rules:
        own, other = tuple(ours + name for name in rule.ours), tuple(theirs + name for name in rule.theirs)
        yield Rule(own, other, rule.to_ours, rule.to_theirs)


def pth_rules(
    config: RecurrentConfig, mixer: Callable[[int], Iterable[Rule]], factors: Mapping[str, str]
) -> Iterator[Rule]:
    """`model_rules` of the authors' files.

    Args:
        factors: of the channel mixer's token shift, ours to theirs.
    """
    matrices = ["key.weight", "value.weight", *(["receptance.weight"] if "mix_r" in factors else [])]
    channel_mixer = [vector(ours, theirs) for ours, theirs in factors.items()] + list(renamed("", "", matrices))
    return model_rules(config, PTH, mixer, channel_mixer)


def pth_format(
    has: str,
    lacks: str,
    to_ours: Callable[[dict, dict[str, tuple[int, ...]]], RecurrentConfig],
    rules: Callable[[Any], Iterable[Rule]],
    own: Mapping[str, Any] | None = None,
    ignored: str | None = None,
) -> Format:
    """The format "rwkv" of a generation, recognised by a tensor of the first block that it has and one that it lacks.

    Args:
        own: fields that must have these values. The rest as for `Format`.
    """

    def recognises(config: dict, shapes: dict) -> bool:
        return not config and f"blocks.0.att.{has}" in shapes and f"blocks.0.att.{lacks}" not in shapes

    def to_theirs(config: RecurrentConfig) -> dict:
        refuse_unless(config, "rwkv", {"rms_norm_eps": 1e-5, "tie_word_embeddings": False} | dict(own or {}))
        return {}

    return Format("rwkv", recognises, to_ours, to_theirs, rules, ignored=ignored, file="model.pth")


# FLA leaves out of config.json what equals its defaults, so they are needed here.
FLA_DEFAULTS = DEFAULTS | {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "norm_eps": 1e-5}
FLA_SAME = (*SAME, "intermediate_size", "max_position_embeddings")


def fla_fields(source: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of our configuration, and every setting of theirs with its default.

    Args:
        source: config.json. own: settings of the generation and their defaults, `hidden_ratio` among them.
    Raises:
        RnnzooError: a setting that the zoo cannot express.
    """
    values = FLA_DEFAULTS | dict(own)
    values |= {name: source[name] for name in values if name in source}
    for name, only in (("hidden_act", "sqrelu"), ("norm_first", True), ("norm_bias", True), ("attn", None)):
        if values[name] != only:
            raise RnnzooError(f"This checkpoint has {name}={values[name]!r}, but only {name}={only!r} can be imported.")
    if values["intermediate_size"] is None:
        values["intermediate_size"] = (
            -(-int(values["hidden_size"] * (values["hidden_ratio"] or own["hidden_ratio"])) // 32) * 32
        )
    fields = {name: values[name] for name in FLA_SAME}
    return fields | {"rms_norm_eps": values["norm_eps"]}, values


def fla_values(config: RecurrentConfig, class_name: str, own: Mapping[str, Any], limits: Mapping[str, Any]) -> dict:
    """config.json of FLA.

    Args:
        class_name: without "ForCausalLM". own: settings of the generation. limits: fields that must have these values.
    Raises:
        RnnzooError: the format cannot express the configuration.
    """
    refuse_unless(config, "fla", limits)
    return (
        {"architectures": [f"{class_name}ForCausalLM"], "model_type": class_name.lower(), "hidden_act": "sqrelu"}
        | {name: getattr(config, name) for name in FLA_SAME}
        | {"norm_eps": config.rms_norm_eps, "dtype": str(config.dtype).removeprefix("torch.")}
        | dict(own)
    )
