"""Gated DeltaNet: the same numbers as transformers' Qwen3-Next (FLA's: test_fla.py), and the start of its decay."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.importing import import_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.gated_delta_net.configuration_gated_delta_net import GatedDeltaNetConfig
from rnnzoo.zoo.gated_delta_net.modeling_gated_delta_net import GatedDeltaNetForCausalLM, GatedDeltaNetMixer

SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4}
SIZES |= {"mlp_only_layers": [0, 1, 2, 3], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
VARIANTS = {
    "grouped values": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 12},
    "few layers of attention": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
        "layer_types": ["full_attention", *["linear_attention"] * 3],
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
}


# Of a wider range of weights, either implementation in float32 is 2e-4 from float64: keys of length near 0 are normed.
@pytest.fixture(params=VARIANTS)
def original(request, tmp_path):
    torch.manual_seed(2)
    config = transformers.Qwen3NextConfig(
        **SIZES, **VARIANTS[request.param], linear_key_head_dim=8, initializer_range=0.06
    )
    model = transformers.Qwen3NextForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "original", max_shard_size="20KB")
    return model, tmp_path / "original"


@torch.no_grad()
def test_an_imported_qwen3_next_gives_equal_logits_and_generations(original, tmp_path):
    model, folder = original
    ours = transformers.AutoModelForCausalLM.from_pretrained(
        import_checkpoint(folder, "gated_delta_net", tmp_path / "o")
    )
    assert isinstance(ours, GatedDeltaNetForCausalLM)
    ids = torch.randint(3, 67, (2, 71))
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    arguments = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    arguments["no_repeat_ngram_size"] = 2  # a random model would say the same token for ever
    expected = model.generate(ids[:, :9], **arguments)
    assert torch.equal(ours.generate(ids[:, :9], **arguments), expected) and len(expected[:, 9:].unique()) > 9


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mlp_only_layers": [0]}, "experts"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_cannot_be_expressed_is_refused(original, tmp_path, changed, message):
    _, folder = original
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(RnnzooError, match=message):
        import_checkpoint(folder, "gated_delta_net", tmp_path / "new")


def mixer(**fields) -> GatedDeltaNetMixer:
    torch.manual_seed(0)
    config = GatedDeltaNetConfig(vocab_size=61, hidden_size=36, num_hidden_layers=1, **fields)
    return GatedDeltaNetForCausalLM(config).model.layers[0].mixer


def test_the_decay_starts_as_mamba2s():
    made = mixer(gdn_num_heads=9, gdn_v_heads=9999)
    step, a = torch.nn.functional.softplus(made.dt_bias), made.A_log.exp()
    assert a.min() >= 0.01 and a.max() <= 16 and abs(a.mean() - 8) < 0.2
    assert step.min() >= 0.999e-3 and step.max() <= 0.1001 and abs(step.log().mean().exp() - 0.01) < 0.001


def test_a_student_has_the_teachers_matrices():
    made = mixer(
        num_attention_heads=9, num_key_value_heads=3, head_dim=4, **GatedDeltaNetConfig.student_fields(9, 3, 4)
    )
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    made.init_from_attention(AttentionWeights(q, k, v, o, 9, 3, 4))
    for name, matrix in zip("qkvo", (q, k, v, o), strict=True):
        assert torch.equal(getattr(made.proj, f"{name}_proj").weight, matrix)
    assert torch.equal(made.proj.conv1d.weight[0, 0], torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert made.init_state(1, torch.device("cpu"), torch.float32).s.shape == (1, 3, 4, 4)


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match="gdn_gate_activation"):
        mixer(gdn_gate_activation="tanh")
