"""GateLoop: the paper's recurrence in numpy's complex numbers, its surrogate attention, a student of attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rnnzoo.kernels.errors import ShapeError
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.gateloop.configuration_gateloop import GateLoopConfig
from rnnzoo.zoo.gateloop.modeling_gateloop import GateLoopForCausalLM, GateLoopMixer

HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 2}


@torch.no_grad()
def made(**fields):
    """A mixer in float64, its hidden states (2, 19, 12), its output, and its projections of them in numpy."""
    torch.manual_seed(3)
    config = GateLoopConfig(vocab_size=11, hidden_size=12, num_hidden_layers=1, **HEADS, **fields)
    model = GateLoopForCausalLM(config).double().eval().model
    mixer, hidden = model.layers[0].mixer, torch.randn(2, 19, 12, dtype=torch.float64)
    out = mixer(hidden, None, model.make_context(2, 19, hidden.device))[0].numpy()
    matrices = {name: p.numpy() for name, p in mixer.named_parameters()}
    projected = {n: hidden.numpy() @ matrices[f"proj.{n}_proj.weight"].T for n in "qkv"}
    for n in "kv":  # three groups of two channels, each for two of the six groups of q
        projected[n] = projected[n].reshape(2, 19, 3, 2).repeat(2, axis=2).reshape(2, 19, 12)
    projected |= {n: hidden.numpy() @ matrices[f"{n}_proj.weight"].T for n in "ag"}
    return mixer, matrices, projected, out


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_it_is_the_papers_recurrence():
    _, matrices, p, out = made(gateloop_norm_groups=4)
    h, expected = np.zeros((2, 12), complex), []
    for t in range(19):
        alpha, beta = np.split(p["a"][:, t], 2, -1)
        h = sigmoid(alpha) * np.exp(1j * beta) * h + p["k"][:, t] * p["v"][:, t]
        y = (p["q"][:, t] * h).real.reshape(2, 4, 3)
        y = ((y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)).reshape(2, 12)
        expected.append(y * p["g"][:, t] * sigmoid(p["g"][:, t]) @ matrices["proj.o_proj.weight"].T)
    np.testing.assert_allclose(out, np.stack(expected, 1), rtol=1e-9, atol=1e-9)


def test_it_equals_the_papers_surrogate_attention():
    """(q_t prod(a up to t)) (k_s / prod(a up to s)), masked, on v: attention with relative positions from the data."""
    _, matrices, p, out = made(gateloop_norm_groups=0)
    alpha, beta = np.split(p["a"], 2, -1)
    product = np.exp(np.cumsum(np.log(sigmoid(alpha)) + 1j * beta, 1))
    scores = np.einsum("btc,bsc->btsc", p["q"] * product, p["k"] / product)
    scores = scores * np.tril(np.ones((19, 19)))[None, :, :, None]
    y = np.einsum("btsc,bsc->btc", scores, p["v"]).real * p["g"] * sigmoid(p["g"])
    np.testing.assert_allclose(out, y @ matrices["proj.o_proj.weight"].T, rtol=1e-7, atol=1e-9)


def test_matrices_start_xavier_normal():
    config = GateLoopConfig(vocab_size=11, hidden_size=256, num_hidden_layers=1)
    mixer = GateLoopForCausalLM(config).model.layers[0].mixer
    for layer, rows in ((mixer.proj.q_proj, 256), (mixer.a_proj, 512)):
        assert layer.weight.std().item() == pytest.approx((2 / (256 + rows)) ** 0.5, rel=0.05)


def test_a_student_has_the_teachers_matrices():
    config = GateLoopConfig(vocab_size=11, hidden_size=12, num_hidden_layers=1, **HEADS)
    mixer = GateLoopMixer(config, 0)
    q, k, v, o = torch.randn(12, 12), torch.randn(6, 12), torch.randn(6, 12), torch.randn(12, 12)
    mixer.init_from_attention(AttentionWeights(q, k, v, o, 6, 3, 2))
    for name, matrix in zip("qkvo", (q, k, v, o), strict=True):
        assert torch.equal(getattr(mixer.proj, f"{name}_proj").weight, matrix)
    with pytest.raises(ShapeError, match="q_proj.bias"):
        mixer.init_from_attention(AttentionWeights(q, k, v, o, 6, 3, 2, q_bias=torch.ones(12)))


@pytest.mark.parametrize("groups", [5, 32])
def test_groups_that_do_not_divide_or_leave_nothing_are_refused(groups):
    with pytest.raises(ValueError, match="gateloop_norm_groups"):
        GateLoopConfig(hidden_size=32, num_hidden_layers=1, gateloop_norm_groups=groups)
