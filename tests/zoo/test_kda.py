"""Kimi Delta Attention and latent attention: the same numbers as transformers' Kimi Linear (FLA's: test_fla.py)."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.kda.configuration_kda import KDAConfig
from rnnzoo.zoo.kda.modeling_kda import KDAForCausalLM, KDAMixer, LatentAttention

SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": None}
SIZES |= {"qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 10, "linear_head_dim": 8}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "mlp_layer_types": ["dense"] * 4}
VARIANTS = {
    "as published": {"linear_num_heads": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"]},
    "without attention": {"linear_num_heads": 3, "layer_types": ["linear_attention"] * 4},
    "attention first": {"linear_num_heads": 4, "layer_types": ["full_attention", *["linear_attention"] * 3]},
}


@pytest.fixture(params=VARIANTS)
def original(request, tmp_path):
    torch.manual_seed(2)
    # Of a wider range of weights, either implementation in float32 is 2e-4 from float64: keys near 0 are normed.
    config = transformers.KimiLinearConfig(**SIZES, **VARIANTS[request.param], initializer_range=0.06)
    model = transformers.KimiLinearForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "original", max_shard_size="20KB")
    return model, tmp_path / "original"


@torch.no_grad()
def test_an_imported_kimi_linear_gives_equal_logits_and_generations(original, tmp_path):
    model, folder = original
    ours = transformers.AutoModelForCausalLM.from_pretrained(import_checkpoint(folder, "kda", tmp_path / "ours"))
    assert isinstance(ours, KDAForCausalLM)
    ids = torch.randint(3, 67, (2, 71))
    torch.testing.assert_close(ours(ids).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    arguments = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    arguments["no_repeat_ngram_size"] = 2  # a random model would say the same token for ever
    cached = "full_attention" in model.config.layer_types  # else transformers' cache cannot say how long it is
    arguments |= {} if cached else {"max_new_tokens": 16, "min_new_tokens": 16}
    expected = model.generate(ids[:, :9], use_cache=cached, **arguments)
    assert torch.equal(ours.generate(ids[:, :9], **arguments), expected) and len(expected[:, 9:].unique()) > 9


@pytest.mark.parametrize("format", ["transformers", "moonshot"])
@torch.no_grad()
def test_transformers_reads_what_we_export(format, tmp_path):
    torch.manual_seed(0)
    types = ["kda", "kda.attention"]
    config = KDAConfig(vocab_size=67, hidden_size=32, num_hidden_layers=2, layer_types=types, initializer_range=0.06)
    ours = KDAForCausalLM(config).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = export_checkpoint(tmp_path / "ours", format, tmp_path / "theirs")
    model = transformers.KimiLinearForCausalLM.from_pretrained(theirs).eval()
    ids = torch.randint(3, 67, (2, 21))
    torch.testing.assert_close(model(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mlp_layer_types": None}, r"\[1, 2, 3\].*experts"),
        ({"q_lora_rank": 8}, "q_lora_rank"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_cannot_be_expressed_is_refused(original, tmp_path, changed, message):
    _, folder = original
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(RnnzooError, match=message):
        import_checkpoint(folder, "kda", tmp_path / "new")


@torch.no_grad()
def test_the_authors_names_of_settings_are_read(original, tmp_path):
    model, folder = original
    config = json.loads((folder / "config.json").read_text())
    kinds = config.pop("layer_types")
    attention = [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
    linear = {"full_attn_layers": attention, "kda_layers": [i for i in range(1, 5) if i not in attention]}
    linear |= {"head_dim": 8, "num_heads": config.pop("linear_num_heads"), "short_conv_kernel_size": 4}
    config |= {"linear_attn_config": linear, "first_k_dense_replace": 4, "mlp_layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    ours = transformers.AutoModelForCausalLM.from_pretrained(import_checkpoint(folder, "kda", tmp_path / "ours"))
    ids = torch.randint(3, 67, (1, 9))
    torch.testing.assert_close(ours(ids).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def mixer(**fields) -> KDAMixer:
    torch.manual_seed(0)
    config = KDAConfig(vocab_size=61, hidden_size=36, num_hidden_layers=1, **fields)
    return KDAForCausalLM(config).model.layers[0].mixer


def test_the_decay_starts_as_mamba2s():
    made = mixer(kda_num_heads=1000, kda_key_dim=20)
    step, a = torch.nn.functional.softplus(made.dt_bias), made.A_log.exp()
    assert a.min() >= 0.999 and a.max() <= 16.001 and abs(a.mean() - 8.5) < 0.5
    assert step.min() >= 0.999e-3 and step.max() <= 0.1001 and abs(step.log().mean().exp() - 0.01) < 0.001


def test_a_student_has_the_teachers_matrices_and_latent_attention_is_refused():
    made = mixer(num_attention_heads=9, num_key_value_heads=3, head_dim=4, **KDAConfig.student_fields(9, 3, 4))
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    teacher = AttentionWeights(q, k, v, o, 9, 3, 4)
    made.init_from_attention(teacher)
    for name, matrix in zip("qkvo", (q, k, v, o), strict=True):
        assert torch.equal(getattr(made.proj, f"{name}_proj").weight, matrix)
    assert made.init_state(1, torch.device("cpu"), torch.float32).s.shape == (1, 3, 4, 4)
    with pytest.raises(RnnzooError, match="kda.attention"):
        LatentAttention(made.config, 0).init_from_attention(teacher)
