"""RWKV-4 checkpoints of transformers (`model_type` "rwkv") and of the authors (`.pth`) under the zoo's names."""

from __future__ import annotations

from collections.abc import Iterator

from ..core.importing import Format, Rule, of_type, renamed
from ..core.rwkv_files import plain_fields, pth_format, pth_rules, refuse_unless, vector
from .configuration_rwkv4 import RWKV4Config

# transformers leaves out of config.json what equals its defaults, so they are needed here. `rescale_every` is none of
# the model: it halves weights and hidden states alike, against overflow in float16.
DEFAULTS = {
    "vocab_size": 50277,
    "context_length": 1024,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "attention_hidden_size": None,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
RENAMED = {"context_length": "max_position_embeddings", "attention_hidden_size": "rwkv4_width"}
RENAMED |= {"layer_norm_epsilon": "rms_norm_eps"}
MATRICES = ("key.weight", "value.weight", "receptance.weight", "output.weight")


def _pth_to_ours(source: dict, shapes: dict) -> RWKV4Config:
    return RWKV4Config(**plain_fields(shapes), rwkv4_width=shapes["blocks.0.att.key.weight"][0])


def _attention(layer: int) -> Iterator[Rule]:
    for name in "kvr":
        yield vector(f"mix_{name}", f"time_mix_{name}")
    yield from renamed("", "", {"decay": "time_decay", "bonus": "time_first"})
    yield from renamed("", "", MATRICES)


def _pth_rules(config: RWKV4Config) -> Iterator[Rule]:
    return pth_rules(config, _attention, {"mix_k": "time_mix_k", "mix_r": "time_mix_r"})


def _to_ours(source: dict, shapes: dict) -> RWKV4Config:
    values = DEFAULTS | {key: value for key, value in source.items() if key in DEFAULTS}
    if values["intermediate_size"] is None:
        values["intermediate_size"] = 4 * values["hidden_size"]
    fields = {RENAMED.get(name, name): value for name, value in values.items()}
    return RWKV4Config(**fields)


def _to_theirs(config: RWKV4Config) -> dict:
    refuse_unless(config, "transformers", {})
    values = {name: getattr(config, RENAMED.get(name, name)) for name in DEFAULTS}
    dtype = str(config.dtype).removeprefix("torch.")
    return {"architectures": ["RwkvForCausalLM"], "model_type": "rwkv", "dtype": dtype} | values


def _long(name: str) -> str:
    """transformers' name of a tensor of the authors'."""
    for short, long in (
        ("emb.", "rwkv.embeddings."),
        ("blocks.", "rwkv.blocks."),
        ("ln_out.", "rwkv.ln_out."),
        (".ln0.", ".pre_ln."),
        (".att.", ".attention."),
        (".ffn.", ".feed_forward."),
    ):
        name = name.replace(short, long)
    for letter, word in (("k", "key"), ("v", "value"), ("r", "receptance")):
        name = name.removesuffix(f"time_mix_{letter}") + f"time_mix_{word}" * name.endswith(f"time_mix_{letter}")
    return name


def _rules(config: RWKV4Config) -> Iterator[Rule]:
    for rule in _pth_rules(config):
        yield Rule(rule.ours, tuple(map(_long, rule.theirs)), rule.to_ours, rule.to_theirs)


FORMATS = (
    Format("transformers", of_type("rwkv"), _to_ours, _to_theirs, _rules),
    pth_format("time_first", "ln_x.weight", _pth_to_ours, _pth_rules),
)
