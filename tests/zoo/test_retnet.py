"""RetNet: initialisation, sizes, and the student of an attention layer (the recurrence itself: test_fla.py)."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.retnet.configuration_retnet import RetNetConfig
from rnnzoo.zoo.retnet.modeling_retnet import RetNetForCausalLM, RetNetMixer

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}


def test_decays_are_the_papers_and_not_learned():
    mixer = RetNetMixer(RetNetConfig(**SIZES, num_attention_heads=8), 0)
    decays = mixer.log_decay(torch.zeros(1, dtype=torch.float64)).exp()
    assert decays.tolist() == pytest.approx([1 - 2.0 ** -(5 + h) for h in range(8)], rel=1e-12)
    assert not any("decay" in name for name, _ in mixer.named_parameters())


def test_projections_start_with_the_gains_of_the_authors_code():
    torch.manual_seed(0)
    mixer = RetNetForCausalLM(RetNetConfig(**(SIZES | {"hidden_size": 256}))).model.layers[0].mixer
    layers = [mixer.proj.q_proj, mixer.proj.k_proj, mixer.proj.v_proj, mixer.gate, mixer.proj.o_proj]
    for layer, gain in zip(layers, [2**-2.5] * 4 + [2**-1], strict=True):
        bound = gain * math.sqrt(6 / sum(layer.weight.shape))
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize(("size", "billions"), [("1.3B", 1.3), ("2.7B", 2.7), ("6.7B", 6.7)])
def test_published_sizes_have_the_published_number_of_parameters(size, billions):
    with torch.device("meta"):
        model = RetNetForCausalLM(RetNetConfig(**RetNetConfig.sizes[size]))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.05)
    mixer = model.model.layers[0].mixer
    assert mixer.proj.key_width == 256 and mixer.proj.value_width == 512


def test_a_student_has_the_teachers_matrices():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    q, k, v, o = torch.randn(32, 32), torch.randn(16, 32), torch.randn(16, 32), torch.randn(32, 32)
    weights = AttentionWeights(q, k, v, o, 4, 2, 8)
    mixer = RetNetMixer(RetNetConfig(**SIZES, **heads, **RetNetConfig.student_fields(4, 2, 8)), 0)
    mixer.init_from_attention(weights)
    for name, matrix in zip("qkvo", (q, k, v, o), strict=True):
        assert torch.equal(getattr(mixer.proj, f"{name}_proj").weight, matrix)
    with pytest.raises(ShapeError, match="v_proj"):
        RetNetMixer(RetNetConfig(**SIZES, **heads), 0).init_from_attention(weights)


def test_what_cannot_be_said_is_refused(tmp_path):
    with pytest.raises(ValueError, match="retnet_value_factor"):
        RetNetConfig(**SIZES, retnet_value_factor=0.0)
    config = RetNetConfig(**SIZES, rope_parameters={"rope_theta": 500.0})
    RetNetForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(RnnzooError, match="theta 10000"):
        export_checkpoint(tmp_path / "model", "fla", tmp_path / "out")
    RetNetForCausalLM(RetNetConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    theirs = export_checkpoint(tmp_path / "plain", "fla", tmp_path / "theirs")
    settings = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(settings | {"use_output_gate": False}))
    with pytest.raises(RnnzooError, match="use_output_gate"):
        import_checkpoint(theirs, "retnet", tmp_path / "back")
