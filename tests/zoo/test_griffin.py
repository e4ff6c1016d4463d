"""Griffin: the same numbers as transformers' RecurrentGemma, and what its configuration makes by itself."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.griffin.configuration_griffin import GriffinConfig
from rnnzoo.zoo.griffin.modeling_griffin import GriffinForCausalLM

SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4}
VARIANTS = {
    "default": {"num_hidden_layers": 5, "num_key_value_heads": 1},
    "wide": {"num_hidden_layers": 4, "lru_width": 48, "attention_bias": True, "tie_word_embeddings": False},
    "pattern": {
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "block_types": ["attention", "recurrent"],
        "conv1d_width": 3,
        "logits_soft_cap": 5.0,
        "hidden_activation": "silu",
    },
}


@pytest.fixture(params=VARIANTS)
def original(request, tmp_path):
    torch.manual_seed(2)
    config = transformers.RecurrentGemmaConfig(**SIZES, attention_window_size=24, **VARIANTS[request.param])
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 3 and "recurrent_param" not in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "original", max_shard_size="20KB")
    return model, tmp_path / "original"


@torch.no_grad()
def test_an_imported_checkpoint_gives_equal_logits_and_generations(original, tmp_path):
    model, folder = original
    ours = transformers.AutoModelForCausalLM.from_pretrained(import_checkpoint(folder, "griffin", tmp_path / "new"))
    assert isinstance(ours.eval(), GriffinForCausalLM)
    ids = torch.randint(3, 67, (2, 37))
    expected = model(ids, use_cache=False).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-4)
    arguments = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": 66}
    assert torch.equal(ours.generate(ids[:, :9], **arguments), model.generate(ids[:, :9], **arguments))


@torch.no_grad()
def test_an_exported_model_is_read_by_transformers(tmp_path):
    torch.manual_seed(1)
    config = GriffinConfig(vocab_size=67, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, sliding_window=8)
    ours = GriffinForCausalLM(config).eval()
    ours.save_pretrained(tmp_path / "ours")
    out = export_checkpoint(tmp_path / "ours", "transformers", tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(3, 67, (2, 21))
    torch.testing.assert_close(ours(ids).logits, theirs(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    for wrong in ({"logit_cap": None}, {"embedding_scale": 1.0}, {"rglru_blocks": 2}):
        changed = json.loads((tmp_path / "ours" / "config.json").read_text()) | wrong
        (tmp_path / "ours" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(RnnzooError, match="RecurrentGemma has"):
            export_checkpoint(tmp_path / "ours", "transformers", tmp_path / "again")


def test_the_pattern_and_what_goes_with_it_are_the_defaults(tmp_path):
    config = GriffinConfig(vocab_size=11, hidden_size=2560, num_hidden_layers=5)
    assert config.layer_types == ["griffin", "griffin", "sliding_attention", "griffin", "griffin"]
    assert config.num_key_value_heads == 1 and config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.embedding_scale == 50.5  # sqrt(2560) = 50.596 in bfloat16, as transformers has it
    GriffinConfig(hidden_size=32, num_hidden_layers=3, logit_cap=None, embedding_scale=1.0).save_pretrained(tmp_path)
    loaded = GriffinConfig.from_pretrained(tmp_path)
    assert loaded.logit_cap is None and loaded.embedding_scale == 1.0
    student = GriffinConfig(hidden_size=32, num_hidden_layers=3, **GriffinConfig.student_fields(4, 2, 6))
    assert student.rglru_width == 24 and student.logit_cap is None and student.embedding_scale == 1.0


def test_a_scaled_rotation_is_refused(original, tmp_path):
    _, folder = original
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RnnzooError, match="linear"):
        import_checkpoint(folder, "griffin", tmp_path / "new")
