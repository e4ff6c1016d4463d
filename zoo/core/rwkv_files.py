"""The authors' RWKV files (`.pth`, no configuration beside them): what all generations have in common.

Names: `emb`, `blocks.N.{ln0 (the first only), ln1, att.*, ln2, ffn.*}`, `ln_out`, `head`. Vectors are
kept as (1, 1, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...kernels.errors import RnnzooError
from .configuration import RecurrentConfig
from .importing import Format, Rule, renamed

__all__ = [
    "block_count",
    "head_fields",
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


def pth_rules(config: RecurrentConfig, attention: Callable[[int], Iterable[Rule]], ffn: Mapping[str, str]) -> Iterator:
    """Rules of a whole model.

    Args:
        attention: index of a layer -> the rules of its mixer, with names below `mixer.` and `att.`.
        ffn: factors of the channel mixer's token shift, ours to theirs.
    """
    yield Rule(("model.embed_tokens.weight",), ("emb.weight",))
    yield Rule(("lm_head.weight",), ("head.weight",))
    both = ("weight", "bias")
    norms = [("model.embedding_norm.", "blocks.0.ln0."), ("model.norm.", "ln_out.")]
    matrices = ["key.weight", "value.weight", *(["receptance.weight"] if "mix_r" in ffn else [])]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}.", f"blocks.{i}."
        norms += [(f"{ours}input_layernorm.", f"{theirs}ln1."), (f"{ours}post_attention_layernorm.", f"{theirs}ln2.")]
        for own, their in ffn.items():
            yield vector(f"{ours}mlp.{own}", f"{theirs}ffn.{their}")
        yield from renamed(f"{ours}mlp.", f"{theirs}ffn.", matrices)
        for rule in attention(i):
            names = (tuple(f"{ours}mixer.{x}" for x in rule.ours), tuple(f"{theirs}att.{x}" for x in rule.theirs))
            yield Rule(*names, rule.to_ours, rule.to_theirs)
    for own, their in norms:
        yield from renamed(own, their, both)


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
