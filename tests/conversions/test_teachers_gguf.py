"""GGUF files become clean models with the logits of the model that they were written from."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError

from .tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

ARCHITECTURE = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt_neox": "gptneox"}
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)  # fmt: skip


def llama_cpp_layout(values, name: str, architecture: str, config):
    """What llama.cpp's converter does to rows: llama's rotary pairs side by side; NeoX's q, k, v one after another."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return rows.swapaxes(1, 2).reshape(values.shape)
    if architecture == "gptneox" and ".attn_qkv." in name:
        rows = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
        return rows.swapaxes(0, 1).reshape(values.shape)
    return values


def write_gguf(path: Path, model, family: str, *, packed=None, architecture=None, **extra) -> Path:
    """The model as a GGUF file; `packed`: a quantisation for matrices."""
    config, name = model.config, architecture or ARCHITECTURE.get(family, family)
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if family == "gpt_neox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_rope_dimension_count(int(head * rope["partial_rotary_factor"]))
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings", 512))
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** (-np.arange(0, head, 2) / head)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    for key, value in extra.items():
        writer.add_uint32(f"{name}.{key}", value)
    tokenizer = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.add_string("general.license", "cc0-1.0")
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURE[family]]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for parameter, values in model.named_parameters():
        target = names.get_name(parameter, (".weight", ".bias"))
        array = llama_cpp_layout(values.detach().numpy(), target, name, config)
        if packed is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(array), packed), raw_dtype=packed)
        else:
            writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
        ("qwen2", {}),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                                       "original_max_position_embeddings": 128}}),
        ("qwen3", {"head_dim": 12}),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 300.0}}),
    ],
)  # fmt: skip
def test_a_gguf_file_gives_the_logits_of_its_origin(family, changes, tmp_path):
    origin = tiny_model(family, **changes)
    ref = resolve_teacher(str(write_gguf(tmp_path / "tiny.gguf", origin, family)))
    assert (ref.name, ref.kind, ref.gguf_file, ref.licence) == ("tiny", "gguf", "tiny.gguf", "cc0-1.0")
    assert ref.sha.startswith("sha256:")
    model = ref.load()
    ids = torch.randint(3, 300, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, origin(ids).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "clean")
    assert torch.equal(resolve_teacher(str(tmp_path / "clean")).load()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("packed", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_1"])
def test_packed_blocks_are_unpacked(packed, tmp_path):
    kind = gguf.GGMLQuantizationType[packed]
    origin = tiny_model("qwen2", hidden_size=96)
    model = resolve_teacher(str(write_gguf(tmp_path / "x.gguf", origin, "qwen2", packed=kind))).load(torch.bfloat16)
    weight, packed_weight = origin.lm_head.weight.detach(), model.lm_head.weight.detach().float()
    assert model.dtype == torch.bfloat16
    assert 0 < (weight - packed_weight).abs().max() < {"Q4_1": 0.15, "Q5_0": 0.15}.get(packed, 0.02)


def test_the_tokenizer_inside_the_file_is_the_one_it_was_written_from(tmp_path):
    ref = resolve_teacher(str(write_gguf(tmp_path / "x.gguf", tiny_model(), "llama")))
    tokenizer, origin = ref.tokenizer(), tiny_tokenizer()
    text = "the cat and the thing were walking; 1234 naïve\n"
    assert tokenizer(text)["input_ids"] == origin(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == origin.apply_chat_template(chat, tokenize=False)


def test_what_cannot_be_used_is_refused(tmp_path):
    model, path = tiny_model(), tmp_path / "x.gguf"
    write_gguf(path, model, "llama", architecture="gemma2")
    with pytest.raises(RnnzooError, match="unsupported GGUF architecture 'gemma2'; supported are llama"):
        resolve_teacher(str(path))
    write_gguf(path, model, "llama", expert_count=8)
    with pytest.raises(RnnzooError, match="'llama' with experts"):
        resolve_teacher(str(path))
    write_gguf(path, tiny_model(rope_parameters=LLAMA3 | {"factor": 8.0, "low_freq_factor": 2.0}), "llama")
    with pytest.raises(RnnzooError, match="divisors that are not Llama 3's"):
        resolve_teacher(str(path))


@pytest.mark.parametrize("length", [0, 10, 200, 5_000, -1])
def test_a_file_cut_short_is_refused_wherever_it_ends(length, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", tiny_model(), "llama")
    content = path.read_bytes()
    path.write_bytes(content[:length] if length >= 0 else content[:-64])
    with pytest.raises(RnnzooError, match="not a GGUF file|is damaged|is cut short"):
        resolve_teacher(str(path))
    path.write_bytes(b"PK\x03\x04" + content[4:])
    with pytest.raises(RnnzooError, match="not a GGUF file"):
        resolve_teacher(str(path))


def test_a_model_without_a_tensor_is_refused(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    path = write_gguf(tmp_path / "x.gguf", model, "llama")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"))
    with pytest.raises(RnnzooError, match="no tensor blk.1.ffn_up.weight"):
        resolve_teacher(str(path)).load()
