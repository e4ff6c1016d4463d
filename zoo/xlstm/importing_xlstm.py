"""xLSTM's checkpoints of transformers and of xLSTM-7B (`model_type` "xlstm")."""

from __future__ import annotations

from collections.abc import Iterator

from ...kernels.errors import RnnzooError
from ..core.importing import Format, Rule, of_type, renamed
from .configuration_xlstm import xLSTMConfig

# transformers leaves out of config.json what equals its defaults, so they are needed here.
DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_heads": 8,
    "use_bias": False,
    "tie_word_embeddings": False,
    "norm_eps": 1e-6,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "eps": 1e-6,
    "ffn_proj_factor": 2.667,
    "ffn_round_up_to_multiple_of": 64,
    "gate_soft_cap": 15.0,
    "output_logit_soft_cap": 30.0,
    "weight_mode": "single",
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
SAME = ("pad_token_id", "bos_token_id", "eos_token_id")
RENAMED = {
    "num_heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
    "eps": "xlstm_eps",
    "gate_soft_cap": "xlstm_gate_cap",
    "output_logit_soft_cap": "logit_cap",
}
# Of a block: ours -> theirs.
NAMES = {
    "input_layernorm.weight": "norm_mlstm.weight",
    "post_attention_layernorm.weight": "norm_ffn.weight",
    "mixer.proj.q_proj.weight": "mlstm_layer.q.weight",
    "mixer.proj.k_proj.weight": "mlstm_layer.k.weight",
    "mixer.proj.v_proj.weight": "mlstm_layer.v.weight",
    "mixer.proj.o_proj.weight": "mlstm_layer.out_proj.weight",
    "mixer.i_proj.weight": "mlstm_layer.igate_preact.weight",
    "mixer.i_proj.bias": "mlstm_layer.igate_preact.bias",
    "mixer.f_proj.weight": "mlstm_layer.fgate_preact.weight",
    "mixer.f_proj.bias": "mlstm_layer.fgate_preact.bias",
    "mixer.gate_proj.weight": "mlstm_layer.ogate_preact.weight",
    "mixer.norm.weight": "mlstm_layer.multihead_norm.weight",
    "mlp.gate_proj.weight": "ffn.proj_up_gate.weight",
    "mlp.up_proj.weight": "ffn.proj_up.weight",
    "mlp.down_proj.weight": "ffn.proj_down.weight",
}


def _to_ours(source: dict, shapes: dict) -> xLSTMConfig:
    values = DEFAULTS | {key: value for key, value in source.items() if key in DEFAULTS and value is not None}
    if values["weight_mode"] != "single" or values["use_bias"]:
        raise RnnzooError(
            f"This xLSTM checkpoint has weight_mode='{values['weight_mode']}' and use_bias={values['use_bias']}; "
            "the importer reads separate matrices ('single') without biases, as xLSTM-7B has them."
        )
    if values["tie_word_embeddings"]:
        raise RnnzooError("transformers' xLSTM does not tie its embeddings, but this checkpoint asks for it.")
    heads, vocab_and_width = values["num_heads"], shapes["backbone.embeddings.weight"]
    return xLSTMConfig(
        vocab_size=vocab_and_width[0],
        hidden_size=vocab_and_width[1],
        intermediate_size=shapes["backbone.blocks.0.ffn.proj_up.weight"][0],
        num_hidden_layers=source.get("num_blocks") or values["num_hidden_layers"],
        head_dim=shapes["backbone.blocks.0.mlstm_layer.v.weight"][0] // heads,
        xlstm_key_width=shapes["backbone.blocks.0.mlstm_layer.q.weight"][0] // heads,
        **{name: values[name] for name in SAME},
        **{new: values[old] for old, new in RENAMED.items()},
    )


def _factor(part: int, whole: int) -> float:
    """f with int(f * whole) == part, which is how transformers takes it."""
    return next(f for f in (part / whole, (part + 0.5) / whole) if int(f * whole) == part)


def _to_theirs(config: xLSTMConfig) -> dict:
    heads, width = config.num_attention_heads, config.hidden_size
    if set(config.layer_types) != {"xlstm"} or not config.intermediate_size or config.mlp_type != "gated":
        raise RnnzooError("transformers' xLSTM has neither other layers nor other MLPs.")
    if config.num_key_value_heads != heads or config.qk_norm or config.norm_type != "rms":
        raise RnnzooError("transformers' xLSTM has neither grouped heads, norms of q and k nor layer norms.")
    if config.attention_bias or config.attention_output_bias or config.mlp_bias or config.tie_word_embeddings:
        raise RnnzooError("The xlstm format cannot express biases or tied embeddings.")
    return (
        {"architectures": ["xLSTMForCausalLM"], "model_type": "xlstm", "weight_mode": "single", "use_bias": False}
        | {"vocab_size": config.vocab_size, "hidden_size": width, "embedding_dim": width}
        | {"num_hidden_layers": config.num_hidden_layers, "num_blocks": config.num_hidden_layers}
        | {"qk_dim_factor": _factor(heads * config.xlstm_key_width, width)}
        | {"v_dim_factor": _factor(heads * config.head_dim, width)}
        # Rounded up to the multiple, so the factor may be anything that is not above.
        | {"ffn_proj_factor": config.intermediate_size / width / 2}
        | {"ffn_round_up_to_multiple_of": config.intermediate_size}
        | {name: getattr(config, name) for name in SAME}
        | {old: getattr(config, new) for old, new in RENAMED.items()}
        | {"tie_word_embeddings": False, "dtype": str(config.dtype).removeprefix("torch.")}
    )


def _rules(config: xLSTMConfig) -> Iterator[Rule]:
    yield Rule(("model.embed_tokens.weight",), ("backbone.embeddings.weight",))
    yield Rule(("model.norm.weight",), ("backbone.out_norm.weight",))
    yield Rule(("lm_head.weight",), ("lm_head.weight",))
    for i in range(config.num_hidden_layers):
        yield from renamed(f"model.layers.{i}.", f"backbone.blocks.{i}.", NAMES)


FORMATS = (Format("transformers", of_type("xlstm"), _to_ours, _to_theirs, _rules),)
