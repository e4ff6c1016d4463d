"""Phi-Mamba's discrete Mamba-2: equal to a loop over its equations, and its start from attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rnnzoo.kernels.errors import ShapeError
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.phi_mamba.configuration_phi_mamba import PhiMambaConfig
from rnnzoo.zoo.phi_mamba.modeling_phi_mamba import PhiMambaForCausalLM

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 6}
TIME = 13


def layer_of(**fields):
    torch.manual_seed(0)
    model = PhiMambaForCausalLM(PhiMambaConfig(**SIZES, **fields)).double().model
    return model, model.layers[0].mixer


def attention_weights(bias: bool = False, norm: bool = False) -> AttentionWeights:
    made = {name: torch.randn(size, 24) for name, size in (("q", 24), ("k", 12), ("v", 12))}
    made["o"] = torch.randn(24, 24)
    if bias:
        made |= {f"{name}_bias": torch.randn(size) for name, size in (("q", 24), ("k", 12), ("v", 12))}
    if norm:
        made |= {"q_norm": torch.rand(6), "k_norm": torch.rand(6)}
    return AttentionWeights(**made, num_heads=4, num_kv_heads=2, head_dim=6)


@torch.no_grad()
def test_it_is_a_loop_over_its_equations():
    model, mixer = layer_of(phi_mamba_state_size=5, ssm_conv_kernel=3)
    for parameter in mixer.parameters():
        parameter.normal_()
    u = torch.randn(1, TIME, 24, dtype=torch.float64)
    proj = mixer.proj
    cbx = torch.cat([u[0] @ layer.weight.T for layer in (proj.q_proj, proj.k_proj, proj.v_proj)], -1)
    padded = F.pad(cbx, (0, 0, 2, 0))
    taps = proj.conv1d.weight[:, 0]
    cbx = torch.stack([(padded[t : t + 3] * taps.T).sum(0) + proj.conv1d.bias for t in range(TIME)])
    c, b, x = (part.view(TIME, 4, -1) for part in cbx.split([20, 20, 24], -1))
    a = 1 / (1 + torch.exp(u[0] @ mixer.decay.weight.T))  # exp(-softplus)
    z = u[0] @ mixer.gate.weight.T + mixer.gate.bias
    outputs = []
    state = torch.zeros(4, 5, 6, dtype=torch.float64)
    for t in range(TIME):
        state = a[t][:, None, None] * state + b[t][:, :, None] * x[t][:, None, :]
        y = torch.einsum("hn,hnp->hp", c[t], state) + mixer.D[:, None] * x[t]
        outputs.append(proj.o_proj.weight @ (y.flatten() * z[t] * torch.sigmoid(z[t])))
    ours, _ = mixer(u, None, model.make_context(1, TIME, u.device))
    torch.testing.assert_close(ours[0], torch.stack(outputs), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_matrix_is_the_one_of_the_paper():
    model, mixer = layer_of()
    u = torch.randn(1, TIME, 24, dtype=torch.float64)
    ctx = model.make_context(1, TIME, u.device)
    c, b, _, _ = mixer.proj(u, None, ctx)
    log_a = -F.softplus(mixer.decay(u))[0]
    expected = torch.zeros(4, TIME, TIME, dtype=torch.float64)
    for t in range(TIME):
        for s in range(t + 1):
            expected[:, t, s] = (c[0, t] * b[0, s]).sum(-1) * log_a[s + 1 : t + 1].sum(0).exp()
        expected[:, t, t] += mixer.D
    torch.testing.assert_close(mixer.mixing_matrix(u, ctx)[0], expected, rtol=1e-9, atol=1e-9)


def test_a_fresh_layer_has_an_identity_convolution_and_no_bias_of_the_gate():
    _, mixer = layer_of()
    taps = mixer.proj.conv1d.weight[:, 0]
    assert torch.equal(taps, torch.tensor([0.0, 0.0, 0.0, 1.0]).double().expand_as(taps))
    assert not mixer.proj.conv1d.bias.any() and not mixer.gate.bias.any() and bool((mixer.D == 1).all())


@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_started_from_attention_the_matrix_holds_the_teachers_scores(bias, norm):
    weights = attention_weights(bias, norm)
    fields = PhiMambaConfig.student_fields(4, 2, 6) | {"num_key_value_heads": 2}
    model, mixer = layer_of(**fields, attention_bias=bias, qk_norm=norm)
    mixer.init_from_attention(weights)
    u = torch.randn(1, TIME, 24, dtype=torch.float64)
    heads = {}
    for name, count in (("q", 4), ("k", 2), ("v", 2)):
        x = u[0] @ getattr(weights, name).double().T + (getattr(weights, f"{name}_bias").double() if bias else 0)
        x = x.view(TIME, count, 6)
        if norm and name != "v":
            x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * getattr(weights, f"{name}_norm").double()
        heads[name] = x.repeat_interleave(4 // count, 1)
    scores = torch.einsum("thd,shd->hts", heads["q"], heads["k"]) * 6**-0.5
    log_a = -F.softplus(u[0] @ mixer.decay.weight.T).T
    decay = (log_a.cumsum(-1)[:, :, None] - log_a.cumsum(-1)[:, None, :]).exp().tril()
    matrix = mixer.mixing_matrix(u, model.make_context(1, TIME, u.device))[0]
    torch.testing.assert_close(matrix, scores * decay + torch.eye(TIME), rtol=1e-6, atol=1e-6)
    # The gate lets all through, and o is the teacher's.
    out, _ = mixer(u, None, model.make_context(1, TIME, u.device))
    expected = torch.einsum("hts,shd->thd", matrix, heads["v"]).flatten(1) @ weights.o.double().T
    torch.testing.assert_close(out[0], expected, rtol=1e-6, atol=1e-6)


def test_wrong_sizes_are_refused():
    _, mixer = layer_of(phi_mamba_state_size=5)
    with pytest.raises(ShapeError, match="heads"):
        mixer.init_from_attention(attention_weights())
    with pytest.raises(ValueError, match="phi_mamba_state_size must be positive"):
        PhiMambaConfig(**SIZES, phi_mamba_state_size=0)
