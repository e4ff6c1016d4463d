"""Mamba-2: the same numbers as transformers' implementation, and the student of an attention layer."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint, importable
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.mamba2.configuration_mamba2 import Mamba2Config
from rnnzoo.zoo.mamba2.modeling_mamba2 import Mamba2ForCausalLM, Mamba2Mixer

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16, "chunk_size": 8}
VARIANTS = {
    "plain": {"n_groups": 1, "state_size": 16},
    "groups": {"n_groups": 2, "state_size": 8, "use_bias": True, "tie_word_embeddings": True},
    "limits": {"n_groups": 4, "state_size": 8, "time_step_limit": (0.01, 0.05), "use_conv_bias": False},
}


@pytest.fixture(params=VARIANTS)
def original(request, tmp_path):
    torch.manual_seed(2)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**SIZES, **VARIANTS[request.param])).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    folder = tmp_path / "original"
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer_config.json").write_text("{}")
    return model, folder


@torch.no_grad()
def test_an_imported_checkpoint_gives_equal_logits_and_generations(original, tmp_path):
    model, folder = original
    out = import_checkpoint(folder, "mamba2", tmp_path / "new")
    ours = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(ours, Mamba2ForCausalLM)
    assert (out / "tokenizer_config.json").is_file()
    ids = torch.randint(3, 67, (2, 21))
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    if model.config.time_step_limit[0] == 0:  # transformers' one-token step forgets the limits
        arguments = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(ours.generate(ids, **arguments), model.generate(ids, **arguments))


def test_import_refuses_what_it_cannot_read(original, tmp_path):
    _, folder = original
    assert "mamba2" in importable()
    with pytest.raises(RnnzooError, match="no importer"):
        import_checkpoint(folder, "supra", tmp_path / "new")
    with pytest.raises(RnnzooError, match="not empty"):
        import_checkpoint(folder, "mamba2", folder)
    with pytest.raises(RnnzooError, match="config.json"):
        import_checkpoint(tmp_path, "mamba2", tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(RnnzooError, match="llama"):
        import_checkpoint(folder, "mamba2", tmp_path / "new")
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(b"not a tensor")
    with pytest.raises(RnnzooError, match="cannot be read"):
        import_checkpoint(folder, "mamba2", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original"]


@torch.no_grad()
def test_a_checkpoint_of_the_authors_package_is_read(tmp_path):
    torch.manual_seed(3)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**SIZES, n_groups=1, state_size=16)).eval()
    tensors = {name.replace("embeddings", "embedding"): x for name, x in model.state_dict().items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    # As state-spaces/mamba2-130m has it, and smaller.
    config = {"d_model": 32, "d_intermediate": 0, "n_layer": 3, "vocab_size": 67, "attn_layer_idx": [], "attn_cfg": {}}
    config |= {"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 16}, "rms_norm": True, "residual_in_fp32": True}
    config |= {"fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    new = import_checkpoint(tmp_path, "mamba2", tmp_path / "new")
    ours = transformers.AutoModelForCausalLM.from_pretrained(new)
    ids = torch.randint(3, 67, (2, 9))
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    written = json.loads((export_checkpoint(new, "mamba_ssm", tmp_path / "back") / "config.json").read_text())
    assert config["ssm_cfg"].items() <= written["ssm_cfg"].items() and not written["tie_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}))
    with pytest.raises(RnnzooError, match="D_has_hdim"):
        import_checkpoint(tmp_path, "mamba2", tmp_path / "other")


def student_config(**fields) -> Mamba2Config:
    sizes = {"vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 4}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    return Mamba2Config(**sizes, **heads, **Mamba2Config.student_fields(9, 3, 4), **fields)


def weights(**extra) -> AttentionWeights:
    torch.manual_seed(0)
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    return AttentionWeights(q, k, v, o, 9, 3, 4, **extra)


def test_a_student_of_attention_takes_its_matrices_and_keeps_the_rest_as_in_the_paper():
    mixer = Mamba2Mixer(student_config(), 0)
    torch.manual_seed(5)
    mixer.init_weights()
    teacher = weights()
    before = mixer.in_proj.weight.detach().clone()
    mixer.init_from_attention(teacher)
    z, x, b, c, dt = mixer.in_proj.weight.split([36, 12, 12, 36, 9])
    assert torch.equal(x, teacher.v) and torch.equal(b, teacher.k) and torch.equal(c, teacher.q)
    assert torch.equal(mixer.out_proj.weight, teacher.o)
    assert torch.equal(z, before[:36]) and torch.equal(dt, before[-9:])
    a, step = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert a.min() >= 1 and a.max() <= 16
    assert step.min() >= 0.999e-3 and step.max() <= 0.1001
    assert torch.equal(mixer.D, torch.ones(9))
    assert mixer.norm.group_width == 4  # per head


def test_a_student_keeps_the_teachers_biases_and_norms():
    mixer = Mamba2Mixer(student_config(attention_bias=True, qk_norm=True), 0)
    extra = {"q_bias": torch.randn(36), "k_bias": torch.randn(12), "v_bias": torch.randn(12)}
    mixer.init_from_attention(weights(**extra, q_norm=torch.rand(4), k_norm=torch.rand(4)))
    _, x, b, c, _ = mixer.in_proj.bias.split([36, 12, 12, 36, 9])
    for ours, name in ((x, "v_bias"), (b, "k_bias"), (c, "q_bias")):
        assert torch.equal(ours, extra[name])
    assert mixer.c_norm.weight.requires_grad and not torch.equal(mixer.c_norm.weight, torch.ones(4))
    with pytest.raises(ShapeError, match="v bias"):
        Mamba2Mixer(student_config(), 0).init_from_attention(weights(**extra))
    with pytest.raises(ShapeError, match="in_proj's x"):
        Mamba2Mixer(Mamba2Config(hidden_size=36, num_hidden_layers=1), 0).init_from_attention(weights())


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="ssm_groups"):
        Mamba2Config(hidden_size=32, num_hidden_layers=1, ssm_num_heads=4, ssm_groups=3)
