"""HGRN2: bounds of the forget gates, and the student of an attention layer (the recurrence itself: test_fla.py)."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.importing import export_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.hgrn2.configuration_hgrn2 import HGRN2Config
from rnnzoo.zoo.hgrn2.modeling_hgrn2 import HGRN2ForCausalLM, HGRN2Mixer, HGRN2Model

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4}


@torch.no_grad()
def test_bounds_start_evenly_spaced_and_never_fall_over_the_layers():
    model = HGRN2Model(HGRN2Config(**SIZES))
    ctx = model.make_context(1, 1, torch.device("cpu"))
    bounds = model.shared["hgrn2"]
    assert [bounds.bound(i, ctx).unique().item() for i in range(4)] == pytest.approx([0, 0.25, 0.5, 0.75])
    bounds.logits.copy_(torch.randn_like(bounds.logits) * 3)
    gammas = torch.stack([bounds.bound(i, model.make_context(1, 1, torch.device("cpu"))) for i in range(4)])
    assert (gammas.diff(dim=0) > 0).all() and gammas.max() < 1
    log_forget, complement = bounds(torch.linspace(-30, 30, 32), 2, ctx)
    assert torch.all(log_forget.exp() >= bounds.bound(2, ctx) - 1e-6)
    torch.testing.assert_close(log_forget.exp() + complement, torch.ones(32))


def test_only_layers_of_its_kind_are_counted_for_the_bounds():
    types = ["full_attention", "hgrn2", "full_attention", "hgrn2"]
    bounds = HGRN2Model(HGRN2Config(**SIZES, layer_types=types)).shared["hgrn2"]
    assert bounds.logits.shape == (2, 32) and bounds.rows == {1: 0, 3: 1}
    assert "hgrn2" not in HGRN2Model(HGRN2Config(**SIZES, hgrn2_lower_bounds=False)).shared


def test_a_student_has_the_teachers_matrices_and_one_state_per_kv_head():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4}
    config = HGRN2Config(
        vocab_size=61, hidden_size=36, num_hidden_layers=2, **heads, **HGRN2Config.student_fields(9, 3, 4)
    )
    mixer = HGRN2Mixer(config, 0)
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    mixer.init_from_attention(AttentionWeights(q, k, v, o, 9, 3, 4))
    for name, matrix in zip("qkvo", (q, k, v, o), strict=True):
        assert torch.equal(getattr(mixer.proj, f"{name}_proj").weight, matrix)
    assert mixer.init_state(2, torch.device("cpu"), torch.bfloat16).s.shape == (2, 3, 4, 4)


def test_wrong_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="hgrn2_kv_heads"):
        HGRN2Config(**SIZES, hgrn2_num_heads=4, hgrn2_kv_heads=3)
    HGRN2ForCausalLM(HGRN2Config(**SIZES, hgrn2_num_heads=4, hgrn2_kv_heads=2)).save_pretrained(tmp_path / "model")
    with pytest.raises(RnnzooError, match="as many of gates"):
        export_checkpoint(tmp_path / "model", "fla", tmp_path / "theirs")
