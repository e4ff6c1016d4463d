"""Gated linear attention: gates, sizes, and the student of an attention layer (the recurrence itself: test_fla.py)."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.importing import export_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.gla.configuration_gla import GLAConfig
from rnnzoo.zoo.gla.modeling_gla import GLAForCausalLM, GLAMixer

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}


def test_keys_are_half_as_wide_as_values_and_gates_start_near_one():
    model = GLAForCausalLM(GLAConfig(**SIZES, num_attention_heads=4))
    mixer = model.model.layers[0].mixer
    assert (mixer.proj.key_width, mixer.proj.value_width) == (4, 8)
    assert not mixer.forget_up.bias.any()
    # sigmoid(0)^(1/16), but for the small random logits
    assert mixer.log_decay(torch.randn(1, 9, 32)).exp().mean().item() == pytest.approx(0.5 ** (1 / 16), abs=1e-3)


@pytest.mark.parametrize(("size", "billions"), [("340M", 0.34), ("1.3B", 1.3)])
def test_published_sizes_have_the_published_number_of_parameters(size, billions):
    with torch.device("meta"):
        model = GLAForCausalLM(GLAConfig(**GLAConfig.sizes[size]))
    once = model.num_parameters() - model.lm_head.weight.numel()  # the embeddings counted once
    assert once / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_student_has_the_teachers_matrices():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    q, k, v, o = torch.randn(32, 32), torch.randn(16, 32), torch.randn(16, 32), torch.randn(32, 32)
    weights = AttentionWeights(q, k, v, o, 4, 2, 8)
    mixer = GLAMixer(GLAConfig(**SIZES, **heads, **GLAConfig.student_fields(4, 2, 8)), 0)
    mixer.init_from_attention(weights)
    for name, matrix in zip("qkvo", (q, k, v, o), strict=True):
        assert torch.equal(getattr(mixer.proj, f"{name}_proj").weight, matrix)
    with pytest.raises(ShapeError, match="q_proj"):
        GLAMixer(GLAConfig(**SIZES, **heads), 0).init_from_attention(weights)


def test_what_cannot_be_said_is_refused(tmp_path):
    for name, wrong in {"gla_key_width": 0, "gla_gate_rank": -1, "gla_gate_divisor": 0.0}.items():
        with pytest.raises(ValueError, match=f"{name} must be positive, got {wrong}"):
            GLAConfig(**SIZES, **{name: wrong})
    GLAForCausalLM(GLAConfig(**SIZES, gla_gate_rank=8)).save_pretrained(tmp_path / "model")
    with pytest.raises(RnnzooError, match="gla_gate_rank=16 always, not 8"):
        export_checkpoint(tmp_path / "model", "fla", tmp_path / "out")
