"""DeltaNet: memory that is replaced, not blurred, and the student of an attention layer (the rest: test_fla.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.importing import export_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.delta_net.configuration_delta_net import DeltaNetConfig
from rnnzoo.zoo.delta_net.modeling_delta_net import DeltaNetForCausalLM, DeltaNetMixer, DeltaNetModel

TEACHER = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4}
STUDENT = {"vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 1}
STUDENT |= TEACHER | DeltaNetConfig.student_fields(9, 3, 4)


def weights(**extra) -> AttentionWeights:
    torch.manual_seed(0)
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    return AttentionWeights(q, k, v, o, 9, 3, 4, **extra)


@torch.no_grad()
def test_a_student_reads_the_teachers_values_by_the_directions_of_its_keys():
    model = DeltaNetModel(DeltaNetConfig(**STUDENT))
    mixer: DeltaNetMixer = model.layers[0].mixer
    teacher = weights()
    mixer.init_from_attention(teacher)
    assert mixer.init_state(2, torch.device("cpu"), torch.bfloat16).s.shape == (2, 3, 4, 4)
    hidden = torch.randn(1, 5, 36)
    out, _ = mixer(hidden, None, model.make_context(1, 5, hidden.device))
    q, k, v = (F.linear(hidden[0], matrix).unflatten(-1, (-1, 4)) for matrix in (teacher.q, teacher.k, teacher.v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta, state, expected = torch.sigmoid(mixer.b_proj(hidden[0])), torch.zeros(3, 4, 4), []
    for t in range(5):
        step = torch.eye(4) - beta[t, :, None, None] * k[t, :, :, None] * k[t, :, None, :]
        state = step @ state + beta[t, :, None, None] * k[t, :, :, None] * v[t, :, None, :]
        o = torch.einsum("hk,hkv->hv", q[t], state.repeat_interleave(3, 0)) / 2
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5)
        expected.append(F.linear(o.flatten(), teacher.o))
    torch.testing.assert_close(out[0], torch.stack(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_students_biases_and_norms_are_kept_or_refused():
    extra = {"q_bias": torch.randn(36), "k_bias": torch.randn(12), "v_bias": torch.randn(12)}
    extra |= {"q_norm": torch.rand(4), "k_norm": torch.rand(4)}
    mixer = DeltaNetMixer(DeltaNetConfig(**STUDENT, attention_bias=True, qk_norm=True), 0)
    mixer.init_from_attention(weights(**extra))
    assert torch.equal(mixer.proj.v_proj.bias, extra["v_bias"]) and torch.equal(
        mixer.proj.k_norm.weight, extra["k_norm"]
    )
    with pytest.raises(ShapeError, match="bias"):
        DeltaNetMixer(DeltaNetConfig(**STUDENT), 0).init_from_attention(weights(**extra))
    with pytest.raises(ShapeError, match="kv heads"):
        DeltaNetMixer(DeltaNetConfig(**{**STUDENT, "delta_k_heads": 9, "delta_v_heads": 9}), 0).init_from_attention(
            weights()
        )


@pytest.mark.parametrize("negative", [False, True])
@torch.no_grad()
def test_beta_of_two_turns_a_stored_value_around(negative):
    model = DeltaNetModel(DeltaNetConfig(**STUDENT, delta_negative_eigenvalues=negative))
    mixer: DeltaNetMixer = model.layers[0].mixer
    mixer.init_from_attention(weights())
    mixer.b_proj.weight.copy_(100 * torch.ones(3, 36))
    mixer.proj.v_proj.weight.zero_()
    hidden, state = torch.rand(1, 1, 36), mixer.init_state(1, torch.device("cpu"), torch.float32)
    key = F.normalize(mixer.proj.k_proj(hidden)[0, 0].unflatten(-1, (3, 4)), dim=-1)
    state.s[0] = key[:, :, None] * torch.ones(3, 1, 4)
    before = state.s.clone()
    _, after = mixer(hidden, state, model.make_context(1, 1, hidden.device))
    torch.testing.assert_close(after.s, -before if negative else torch.zeros_like(before), rtol=1e-4, atol=1e-4)


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="delta_v_heads"):
        DeltaNetConfig(hidden_size=32, num_hidden_layers=1, delta_num_heads=4, delta_v_heads=3, delta_k_heads=3)
    with pytest.raises(ValueError, match="delta_conv_activation"):
        DeltaNetConfig(hidden_size=32, num_hidden_layers=1, delta_conv_activation="gelu")
    DeltaNetForCausalLM(DeltaNetConfig(**STUDENT)).save_pretrained(tmp_path / "model")
    with pytest.raises(RnnzooError, match="no students"):
        export_checkpoint(tmp_path / "model", "fla", tmp_path / "theirs")
