"""Mamba: the same numbers as transformers' implementations, the authors' format, and the student of attention."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.core.model import RecurrentModel
from rnnzoo.zoo.mamba.configuration_mamba import MambaConfig
from rnnzoo.zoo.mamba.modeling_mamba import MambaForCausalLM, MambaMixer

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.5}
VARIANTS = {
    "plain": (transformers.MambaForCausalLM, transformers.MambaConfig(**SIZES)),
    "options": (
        transformers.MambaForCausalLM,
        transformers.MambaConfig(
            **SIZES, state_size=5, time_step_rank=7, conv_kernel=3, expand=3, use_bias=True, use_conv_bias=False,
            tie_word_embeddings=False,
        ),
    ),
    "falcon": (
        transformers.FalconMambaForCausalLM,
        transformers.FalconMambaConfig(**SIZES, state_size=8, mixer_rms_eps=1e-3, tie_word_embeddings=False),
    ),
}  # fmt: skip


def original(variant: str, folder):
    """A random model of transformers, and its checkpoint in `folder`."""
    torch.manual_seed(2)
    cls, config = VARIANTS[variant]
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_an_imported_checkpoint_gives_equal_logits_and_generations(variant, tmp_path):
    model = original(variant, tmp_path / "original")
    out = import_checkpoint(tmp_path / "original", "mamba", tmp_path / "new")
    ours = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(ours, MambaForCausalLM) and ours.config.layer_types == ["mamba"] * 3
    ids = torch.randint(3, 67, (2, 21))
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    arguments = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found, expected = ours.generate(ids, **arguments), model.generate(ids, **arguments)
    assert torch.equal(found, expected) and found.shape == (2, 85) and len(found[:, 21:].unique()) > 5
    back = export_checkpoint(out, "transformers", tmp_path / "back")
    again = type(model).from_pretrained(back)
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_checkpoint_of_the_authors_package_is_read(tmp_path):
    model = original("plain", tmp_path / "original")
    folder = tmp_path / "authors"
    folder.mkdir()
    tensors = {name: x for file in (tmp_path / "original").glob("*.safetensors") for name, x in load_file(file).items()}
    tensors["backbone.embedding.weight"] = torch.nn.functional.pad(
        tensors.pop("backbone.embeddings.weight"), (0, 0, 0, 5)
    )
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    # As state-spaces/mamba-130m has it.
    config = {"d_model": 32, "n_layer": 3, "vocab_size": 67, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True}
    config |= {"fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(config))
    ours = transformers.AutoModelForCausalLM.from_pretrained(import_checkpoint(folder, "mamba", tmp_path / "new"))
    assert ours.config.vocab_size == 72 and ours.config.tie_word_embeddings
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(ours(ids).logits[..., :67], model(ids).logits, rtol=1e-4, atol=1e-4)
    back = export_checkpoint(tmp_path / "new", "mamba_ssm", tmp_path / "back")
    written = json.loads((back / "config.json").read_text())
    assert written["ssm_cfg"]["layer"] == "Mamba1" and written["ssm_cfg"]["d_state"] == 16
    assert set(torch.load(back / "pytorch_model.bin")) == set(tensors) - {"lm_head.weight"}


@pytest.mark.parametrize("extra", [{"attn_layer_idx": [1]}, {"d_intermediate": 64}, {"ssm_cfg": {"d_new": 3}}])
def test_an_authors_checkpoint_with_other_layers_or_options_is_refused(extra, tmp_path):
    config = {"d_model": 32, "n_layer": 3, "vocab_size": 67} | extra
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"backbone.embedding.weight": torch.zeros(72, 32)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RnnzooError, match="attention layers or MLPs|d_new"):
        import_checkpoint(tmp_path, "mamba", tmp_path / "new")


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=9, hidden_size=48, num_hidden_layers=2)
    )
    mixer = model.model.layers[1].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(96, -1))
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.999e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1001
    assert mixer.dt_proj.weight.shape == (96, 3) and 0.5 < mixer.dt_proj.weight.abs().max() <= 3**-0.5
    assert torch.equal(mixer.D, torch.ones(96))
    assert 0.9 < mixer.out_proj.weight.abs().max() * math.sqrt(2 * 96) <= 1


# Students of attention -----------------------------------------------------------------------------------------------


def weights(**extra) -> AttentionWeights:
    torch.manual_seed(0)
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    return AttentionWeights(q, k, v, o, 9, 3, 4, **extra)


def student(**fields) -> MambaMixer:
    sizes = {"vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 2} | MambaConfig.student_fields(9, 3, 4)
    return MambaMixer(MambaConfig(**sizes | fields), 0)


def test_a_student_of_attention_takes_its_matrices_biases_and_norms():
    teacher = weights(q_bias=torch.randn(36), k_bias=torch.randn(12), v_bias=torch.randn(12), k_norm=torch.rand(4))
    mixer = student(attention_bias=True, qk_norm=True)
    before = mixer.in_proj.weight.detach().clone()
    mixer.init_from_attention(teacher)
    rows = [12, 36, 12, 36, 3]
    x, z, b, c, dt = mixer.in_proj.weight.split(rows)
    assert torch.equal(x, teacher.v) and torch.equal(b, teacher.k) and torch.equal(c, teacher.q)
    assert torch.equal(mixer.out_proj.weight, teacher.o)
    assert torch.equal(z, before[12:48]) and torch.equal(dt, before[-3:])
    x, _, b, c, _ = mixer.in_proj.bias.split(rows)
    assert torch.equal(x, teacher.v_bias) and torch.equal(b, teacher.k_bias) and torch.equal(c, teacher.q_bias)
    assert torch.equal(mixer.b_norm.weight, teacher.k_norm) and torch.equal(mixer.c_norm.weight, torch.ones(4))


def test_a_student_without_decay_or_convolution_is_linear_attention_with_grouped_heads():
    mixer = student(ssm_conv_kernel=1, ssm_conv_bias=False).double()
    mixer.init_from_attention(weights())
    x = torch.randn(2, 7, 36, dtype=torch.float64)
    with torch.no_grad():
        mixer.conv1d.weight.fill_(1)
        mixer.A_log.fill_(-50)
        mixer.D.zero_()
        mixer.dt_proj.weight.zero_()
        mixer.dt_proj.bias.fill_(math.log(math.e - 1))  # dt = 1
        z = mixer.in_proj(x)[..., 12:48]
        found = run_alone(mixer, x)
    q, k, v = (x @ getattr(weights(), name).double().T for name in "qkv")
    q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in (q, k, torch.nn.functional.silu(v)))
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    o = (q @ k.mT).tril() @ v
    o = o.transpose(1, 2).flatten(-2) * torch.nn.functional.silu(z)
    torch.testing.assert_close(found, o @ weights().o.double().T)


def run_alone(mixer, x):
    return mixer(x, None, RecurrentModel(mixer.config).make_context(*x.shape[:2], x.device))[0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(RnnzooError, match="student_fields"):
        MambaMixer(MambaConfig(hidden_size=36, num_hidden_layers=1), 0).init_from_attention(weights())
    with pytest.raises(ShapeError, match="v bias"):
        student().init_from_attention(weights(v_bias=torch.zeros(12)))
    with pytest.raises(ShapeError, match="in_proj's x"):
        student(mamba_kv_groups=9).init_from_attention(weights())
    with pytest.raises(ValueError, match="mamba_groups"):
        MambaConfig(hidden_size=36, num_hidden_layers=1, mamba_groups=5)
    with pytest.raises(ValueError, match="mamba_kv_groups"):
        MambaConfig(hidden_size=36, num_hidden_layers=1, mamba_kv_groups=2)
