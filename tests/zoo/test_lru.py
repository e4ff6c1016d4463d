"""LRU: the paper's equations in numpy's complex numbers, and the ring it starts on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rnnzoo.zoo.core.cache import CACHE_NAME
from rnnzoo.zoo.lru.configuration_lru import LRUConfig
from rnnzoo.zoo.lru.modeling_lru import LRUForCausalLM


def model(**fields) -> LRUForCausalLM:
    torch.manual_seed(3)
    return LRUForCausalLM(LRUConfig(vocab_size=11, num_hidden_layers=1, **({"hidden_size": 12} | fields))).eval()


def numbers(mixer) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in mixer.named_parameters()}


@torch.no_grad()
def test_it_is_the_papers_recurrence_and_block():
    made = model(lru_state_size=7, lru_r_min=0.5, lru_max_phase=3.0).double()
    mixer, hidden = made.model.layers[0].mixer, torch.randn(2, 31, 12, dtype=torch.float64)
    torch.nn.init.normal_(mixer.glu.bias)
    p = numbers(mixer)
    eigenvalues = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    b = p["in_proj.weight"][:7] + 1j * p["in_proj.weight"][7:]
    c = p["out_proj.weight"][:, :7] - 1j * p["out_proj.weight"][:, 7:]
    h, out = np.zeros((2, 7), complex), []
    for u in hidden.numpy().swapaxes(0, 1):
        h = eigenvalues * h + np.exp(p["gamma_log"]) * (u @ b.T)
        y = (h @ c.T).real + p["D"] * u
        z = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        first, second = np.split(z @ p["glu.weight"].T + p["glu.bias"], 2, -1)
        out.append(first / (1 + np.exp(-second)))
    ours = mixer(hidden, None, made.model.make_context(2, 31, hidden.device))[0]
    np.testing.assert_allclose(ours.numpy(), np.stack(out, 1), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_eigenvalues_start_uniformly_on_the_ring_and_states_at_unit_variance():
    mixer = model(hidden_size=8, lru_state_size=4000, lru_r_min=0.4, lru_r_max=0.9, lru_max_phase=1.0)
    mixer = mixer.model.layers[0].mixer
    radius, phase = torch.exp(-mixer.nu_log.exp()), mixer.theta_log.exp()
    assert radius.min() >= 0.399 and radius.max() <= 0.901 and phase.max() <= 1
    area = (radius**2 - 0.4**2) / (0.9**2 - 0.4**2)
    for uniform in (area, phase):
        assert abs(uniform.mean() - 0.5) < 0.03 and abs(uniform.var() - 1 / 12) < 0.01
    torch.testing.assert_close(mixer.gamma_log.exp() ** 2 + radius**2, torch.ones(4000))
    assert abs(mixer.in_proj.weight.std() - 16**-0.5) < 0.01
    assert abs(mixer.out_proj.weight.std() - 4000**-0.5) < 1e-3
    assert model().model.layers[0].mixer.gamma_log.isfinite().all()


def test_parameters_are_real_and_the_state_is_complex():
    made = model().bfloat16()
    assert not any(parameter.is_complex() for parameter in made.parameters())
    (state,) = made(torch.tensor([[1, 2, 3]]))[CACHE_NAME].states
    assert state.h.dtype == torch.complex64 and state.h.shape == (1, 12)


def test_a_ring_that_is_none_is_refused():
    with pytest.raises(ValueError, match="lru_r_min"):
        LRUConfig(hidden_size=32, num_hidden_layers=1, lru_r_min=0.9, lru_r_max=0.5)
