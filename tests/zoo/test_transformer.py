"""The Transformer baseline: the same numbers as transformers' own."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.transformer.configuration_transformer import TransformerConfig
from rnnzoo.zoo.transformer.modeling_transformer import TransformerForCausalLM, TransformerMixer

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
VARIANTS = {
    "llama": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-scaled": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": 7},
    "qwen2": {"layer_types": MIXED, "use_sliding_window": True, "sliding_window": 6},
    "qwen3": {"head_dim": 12},
    "qwen3-biases": {"attention_bias": True},
}
GREEDY = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=VARIANTS)
def original(request, tmp_path):
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model(request.param.split("-")[0], **(SIZES | VARIANTS[request.param]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "original", max_shard_size="20KB")
    return model, tmp_path / "original"


@torch.no_grad()
def test_an_imported_checkpoint_gives_equal_logits_and_generations(original, tmp_path):
    model, folder = original
    out = import_checkpoint(folder, "transformer", tmp_path / "new")
    ours = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(ours, TransformerForCausalLM)
    ids = torch.randint(3, 67, (2, 21))
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    back = transformers.AutoModelForCausalLM.from_pretrained(export_checkpoint(out, "transformers", tmp_path / "back"))
    assert type(back) is type(model)
    assert torch.equal(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_type": "layer"}, "norm_type='layer'"),
        ({"layer_types": ["transformer", "supra"]}, "supra"),
        ({"intermediate_size": 0}, "without an MLP"),
        ({"attention_output_bias": True}, "combines"),
    ],
)
def test_export_refuses_what_no_format_says(fields, message, tmp_path):
    config = TransformerConfig(vocab_size=7, hidden_size=32, num_hidden_layers=2, **fields)
    TransformerForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(RnnzooError, match=message):
        export_checkpoint(tmp_path / "model", "transformers", tmp_path / "out")


def test_it_starts_from_an_attention_layer_unchanged():
    mixer = TransformerMixer(TransformerConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4), 0)
    q, k, v, o = torch.randn(4, 32, 32)
    mixer.init_from_attention(AttentionWeights(q, k, v, o, 4, 4, 8))
    for name, expected in zip("qkvo", (q, k, v, o), strict=True):
        assert torch.equal(getattr(mixer.proj, f"{name}_proj").weight, expected)


@pytest.mark.parametrize(("size", "millions"), [("135M", 134.5), ("360M", 361.8), ("1.1B", 1100), ("7B", 6738)])
def test_published_sizes_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = TransformerForCausalLM(TransformerConfig(**TransformerConfig.sizes[size]))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=1e-3)


@torch.no_grad()
def test_a_configuration_of_an_older_transformers_is_read_too(tmp_path):
    torch.manual_seed(2)
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=rope)).eval()
    model.save_pretrained(tmp_path / "original")
    file = tmp_path / "original" / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
    file.write_text(json.dumps(config))
    ours = import_checkpoint(tmp_path / "original", "transformer", tmp_path / "new")
    ids = torch.arange(40)[None]
    logits = transformers.AutoModelForCausalLM.from_pretrained(ours)(ids).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
