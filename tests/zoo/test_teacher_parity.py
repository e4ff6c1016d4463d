"""A student whose layers are all attention, filled with the teacher's tensors, is the teacher."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rnnzoo.kernels.errors import ShapeError
from rnnzoo.zoo.core.attention import AttentionProjections
from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.heads import RecurrentForCausalLM
from rnnzoo.zoo.core.mixer import AttentionWeights

SIZES = {"vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 2, "intermediate_size": 48}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4, "initializer_range": 0.3}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}

TEACHERS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-bias-tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN}),
    "llama-linear": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LINEAR}),
    "llama-dynamic": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {"hidden_act": "gelu"}),
    "gpt_neox-sequential": (GPTNeoXForCausalLM, GPTNeoXConfig, {"hidden_act": "gelu", "use_parallel_residual": False}),
}


def teacher_of(kind: str):
    torch.manual_seed(1)
    model_class, config_class, extra = TEACHERS[kind]
    config = config_class(**(SIZES | HEADS | extra))
    model = model_class(config).eval()
    for parameter in model.parameters():  # biases and norms too, which start neutral
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def student_fields(config) -> dict:
    neox = config.model_type == "gpt_neox"
    qwen2 = config.model_type == "qwen2"
    bias = neox or qwen2 or config.attention_bias if config.model_type in ("llama", "gpt_neox", "qwen2") else False
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return {
        **SIZES,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads if neox else config.num_key_value_heads,
        "head_dim": 4 if neox or qwen2 else config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layer_norm_eps if neox else config.rms_norm_eps,
        "norm_type": "layer" if neox else "rms",
        "mlp_type": "plain" if neox else "gated",
        "attention_bias": bias,
        "attention_output_bias": bias and not qwen2,
        "mlp_bias": neox or getattr(config, "mlp_bias", False),
        "qk_norm": config.model_type == "qwen3",
        "parallel_residual": neox and config.use_parallel_residual,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": config.rope_parameters,
        "layer_types": ["full_attention" if window is None else "sliding_attention"] * 2,
        "sliding_window": window,
    }


def attention_weights(config, state: dict, layer: int) -> AttentionWeights:
    heads, width = config.num_attention_heads, SIZES["hidden_size"]
    if config.model_type != "gpt_neox":
        get = lambda name: state.get(f"model.layers.{layer}.self_attn.{name}")  # noqa: E731
        tensors = {n: get(f"{n}_proj.weight") for n in "qkvo"} | {f"{n}_bias": get(f"{n}_proj.bias") for n in "qkvo"}
        norms = {n: get(f"{n}.weight") for n in ("q_norm", "k_norm")}
        head_dim = tensors["q"].shape[0] // heads
        return AttentionWeights(**tensors, **norms, num_heads=heads, num_kv_heads=3, head_dim=head_dim)
    prefix = f"gpt_neox.layers.{layer}.attention."
    fused = state[prefix + "query_key_value.weight"].view(heads, 3, 4, width)
    bias = state[prefix + "query_key_value.bias"].view(heads, 3, 4)
    split = {n: fused[:, i].reshape(-1, width) for i, n in enumerate("qkv")}
    biases = {f"{n}_bias": bias[:, i].reshape(-1) for i, n in enumerate("qkv")}
    o = {"o": state[prefix + "dense.weight"], "o_bias": state[prefix + "dense.bias"]}
    return AttentionWeights(**split, **biases, **o, num_heads=heads, num_kv_heads=heads, head_dim=4)


NEOX_NAMES = {
    "gpt_neox.embed_in.": "model.embed_tokens.",
    "gpt_neox.final_layer_norm.": "model.norm.",
    "gpt_neox.layers.": "model.layers.",
    "mlp.dense_h_to_4h.": "mlp.up_proj.",
    "mlp.dense_4h_to_h.": "mlp.down_proj.",
}


def convert(teacher) -> RecurrentForCausalLM:
    student = RecurrentForCausalLM(RecurrentConfig(**student_fields(teacher.config))).eval()
    shared = {}
    for name, tensor in teacher.state_dict().items():
        for old, new in NEOX_NAMES.items():
            name = name.replace(old, new)
        if "attn." not in name and "attention." not in name.replace("post_attention", ""):
            shared[name] = tensor
    missing, unexpected = student.load_state_dict(shared, strict=False)
    assert not unexpected and all(".mixer." in name for name in missing)
    for i, layer in enumerate(student.model.layers):
        layer.mixer.init_from_attention(attention_weights(teacher.config, teacher.state_dict(), i))
    return student


@pytest.mark.parametrize("kind", TEACHERS)
@torch.no_grad()
def test_all_attention_student_gives_the_teachers_logits(kind):
    teacher = teacher_of(kind)
    student, ids = convert(teacher), torch.randint(0, 61, (2, 13))
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    rows, positions = mask.bool(), (mask.cumsum(1) - 1).clamp(min=0)
    expected = teacher(ids, attention_mask=mask, position_ids=positions).logits
    actual = student(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[rows], expected[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in TEACHERS if k != "llama-dynamic"])
def test_all_attention_student_generates_what_the_teacher_does(kind):
    teacher = teacher_of(kind)
    student, ids = convert(teacher), torch.randint(3, 61, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for extra in ({}, {"num_beams": 3}):
        arguments = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "do_sample": False, **extra}
        assert torch.equal(student.generate(ids, **arguments), teacher.generate(ids, **arguments))


def test_a_teacher_that_does_not_fit_is_refused_with_both_shapes():
    projections = AttentionProjections(RecurrentConfig(**SIZES, **HEADS))
    zeros = torch.zeros(36, 36)
    kv = torch.zeros(12, 36)
    with pytest.raises(ShapeError, match=r"\(9, 9, 4\).*\(9, 3, 4\)"):
        projections.load(AttentionWeights(zeros, zeros, zeros, zeros, 9, 9, 4))
    with pytest.raises(ShapeError, match="q_proj.bias"):
        projections.load(AttentionWeights(zeros, kv, kv, zeros, 9, 3, 4, q_bias=torch.zeros(36)))
