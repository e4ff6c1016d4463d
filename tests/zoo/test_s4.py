"""S4: HiPPO's matrices against their definitions, and the model against a plain loop with dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

from rnnzoo.zoo.s4.configuration_s4 import S4Config
from rnnzoo.zoo.s4.hippo import HIPPO, dplr, legs, legt, low_rank
from rnnzoo.zoo.s4.modeling_s4 import S4ForCausalLM, S4Mixer

from .state_spaces import both_halves, eigenvalues, plain_logits, random_model


def continuous(mixer: S4Mixer):
    p = both_halves(mixer.P)
    a = eigenvalues(mixer) - torch.einsum("drn,drm->dnm", p, p.conj())
    return a, both_halves(mixer.B), both_halves(mixer.C)[:, None]


@pytest.mark.parametrize("measure", ["legs", "legt"])
@torch.no_grad()
def test_logits_are_those_of_a_plain_loop(measure):
    model, ids = random_model((S4Config, S4ForCausalLM), s4_init=measure, s4_state_size=8)
    torch.testing.assert_close(model(ids).logits, plain_logits(model, ids, continuous), rtol=1e-9, atol=1e-9)


def test_hippos_matrices_are_as_defined():
    a, b = legs(5)
    for n in range(5):
        assert b[n] == math.sqrt(2 * n + 1)
        for k in range(5):
            root = math.sqrt((2 * n + 1) * (2 * k + 1))
            expected = -root if n > k else (-(n + 1) if n == k else 0)
            assert a[n, k] == pytest.approx(expected, rel=1e-14)
    a, b = legt(5)
    for n in range(5):
        assert b[n] == math.sqrt(2 * n + 1)
        for k in range(5):
            root = math.sqrt((2 * n + 1) * (2 * k + 1))
            assert a[n, k] == pytest.approx(-root * (1 if n >= k else (-1) ** (n - k)), rel=1e-14)


def test_legts_state_holds_the_polynomials_of_its_window():
    """A constant input's window is the first Legendre polynomial, and no other."""
    a, b = legt(16)
    steady = torch.linalg.solve(-a, b)
    torch.testing.assert_close(steady, torch.eye(16, dtype=torch.float64)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("measure", ["legs", "legt"])
@pytest.mark.parametrize("size", [2, 6, 64])
def test_normal_plus_low_rank_is_hippo_again(measure, size):
    a, b = HIPPO[measure](size)
    p0 = low_rank(measure, size)
    normal = a + p0.T @ p0
    torch.testing.assert_close(normal @ normal.T, normal.T @ normal)
    values, p, b_half, v = dplr(measure, size)
    assert values.shape == (size // 2,) and (values.imag > 0).all() and values.imag.diff().gt(1e-3).all()
    basis, values = torch.cat([v, v.conj()], 1), torch.cat([values, values.conj()])
    torch.testing.assert_close(basis.mH @ basis, torch.eye(size, dtype=basis.dtype))
    torch.testing.assert_close((basis * values) @ basis.mH - p0.T @ p0, a.to(basis.dtype))
    torch.testing.assert_close(p, p0.to(v.dtype) @ v)
    torch.testing.assert_close(2 * (v @ b_half).real, b)
    # In the basis of the eigenvectors, the low-rank part is made of P alone.
    rows = torch.cat([p, p.conj()], 1)
    torch.testing.assert_close(basis.mH @ a.to(basis.dtype) @ basis, torch.diag(values) - rows.mH @ rows)


@pytest.mark.parametrize("measure", ["legs", "legt"])
@torch.no_grad()
def test_it_starts_from_hippo(measure):
    mixer = S4Mixer(S4Config(hidden_size=100, num_hidden_layers=1, s4_init=measure), 0).double()
    torch.manual_seed(0)
    mixer.init_weights()
    a, b, _ = continuous(mixer)
    v = dplr(measure, 64)[3]
    basis = torch.cat([v, v.conj()], 1)
    decay = 0 if measure == "legs" else 1e-4 * torch.eye(64)  # LegT's eigenvalues do not decay: the least there is
    for channel in (0, 99):
        back = basis @ a[channel] @ basis.mH
        torch.testing.assert_close(back.real, HIPPO[measure](64)[0] - decay, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close((basis @ b[channel]).real, HIPPO[measure](64)[1])
    dt = mixer.log_dt.exp()
    assert 0.001 <= dt.min() < 0.002 and 0.05 < dt.max() <= 0.1


@torch.no_grad()
def test_whatever_is_learned_no_state_grows():
    torch.manual_seed(0)
    mixer = S4Mixer(S4Config(hidden_size=9, num_hidden_layers=1, s4_state_size=8), 0)
    mixer.init_weights()
    for parameter in mixer.parameters():
        parameter += torch.randn_like(parameter) * parameter.abs().mean()
    state = mixer.init_state(1, torch.device("cpu"), torch.float32)
    state.h += torch.randn_like(state.h)
    system = {name: x[..., None] if name == "a" else x for name, x in mixer.system().items()}
    h, sizes = state.h[0], []
    for _ in range(50):
        sizes.append(h.norm(dim=-1))
        inner = (system["q"] * h[:, None]).sum(-1).real
        h = system["a"][..., 0] * h + (system["p"] * inner[:, None]).sum(-1)
    assert (torch.stack(sizes).diff(dim=0) <= 1e-6).all()


@pytest.mark.parametrize("fields", [{"s4_init": "fourier"}, {"s4_state_size": 0}, {"s4_state_size": 5}])
def test_options_that_it_does_not_have_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        S4Config(hidden_size=8, num_hidden_layers=1, **fields)
