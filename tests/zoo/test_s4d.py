"""S4D: equal to a plain loop of the paper's equations, and started as it says."""

from __future__ import annotations

import math

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.s4.hippo import legs
from rnnzoo.zoo.s4d.configuration_s4d import S4DConfig
from rnnzoo.zoo.s4d.modeling_s4d import S4DForCausalLM, S4DMixer, eigenvalues

from .state_spaces import bilinear, both_halves, plain_logits, random_model, zero_order_hold
from .state_spaces import eigenvalues as diagonal


def continuous(mixer: S4DMixer):
    return diagonal(mixer), both_halves(mixer.B), both_halves(mixer.C)[:, None]


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("kind", ["legs", "inv", "lin"])
@torch.no_grad()
def test_logits_are_those_of_a_plain_loop(kind, discretization):
    fields = {"s4d_init": kind, "s4d_discretization": discretization, "s4_state_size": 8}
    model, ids = random_model((S4DConfig, S4DForCausalLM), **fields)
    rule = zero_order_hold if discretization == "zoh" else bilinear
    torch.testing.assert_close(model(ids).logits, plain_logits(model, ids, continuous, rule), rtol=1e-9, atol=1e-9)


def mixer(**fields) -> S4DMixer:
    mixer = S4DMixer(S4DConfig(hidden_size=500, num_hidden_layers=1, **fields), 0)
    torch.manual_seed(0)
    mixer.init_weights()
    return mixer


def test_it_starts_as_the_paper_says():
    start = mixer()
    assert start.A_imag.shape == (500, 32)
    torch.testing.assert_close(-start.log_A_real.exp(), torch.full((500, 32), -0.5))
    torch.testing.assert_close(start.A_imag[7], math.pi * torch.arange(32.0))
    assert torch.equal(start.B, torch.tensor([1.0, 0.0]).expand(500, 32, 2))
    assert abs(start.C.square().sum(-1).mean() - 1) < 0.05 and abs(start.D.square().mean() - 1) < 0.3
    dt = start.log_dt.exp()
    assert 0.001 <= dt.min() < 0.0011 and 0.09 < dt.max() <= 0.1
    assert abs(start.log_dt.mean() - math.log(0.01)) < 0.2
    inverse, _ = eigenvalues("inv", 64)
    torch.testing.assert_close(inverse.imag[:2], torch.tensor([64 * 63, 64 * (64 / 3 - 1)]).double() / math.pi)
    assert (inverse.real == -0.5).all()


def test_legs_are_the_eigenvalues_of_hippos_normal_part():
    a, b = legs(64)
    expected = torch.linalg.eigvals(a + torch.outer(b, b) / 2)
    found, _ = eigenvalues("legs", 64)
    torch.testing.assert_close(found.imag, expected.imag[expected.imag > 0].sort().values)
    torch.testing.assert_close(found.real, torch.full((32,), -0.5, dtype=torch.float64))


def test_inv_is_what_the_largest_of_them_come_to_in_large_states():
    ratios = [eigenvalues("inv", n)[0].imag[:4] / eigenvalues("legs", n)[0].imag.flip(0)[:4] for n in (64, 256)]
    assert ((ratios[1] - 1).abs() < 0.03).all() and ((ratios[1] - 1).abs() < (ratios[0] - 1).abs() / 3).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"s4_state_size": 7}, "even"),
        ({"s4_dt_min": 0.2}, "s4_dt_min"),
        ({"s4d_init": "legt"}, "s4d_init.*legt"),
        ({"s4d_discretization": "euler"}, "s4d_discretization.*euler"),
    ],
)
def test_options_that_it_does_not_have_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        S4DConfig(hidden_size=8, num_hidden_layers=1, **fields)


def test_it_has_no_place_for_attentions_matrices():
    with pytest.raises(RnnzooError, match="s4d.*attention"):
        mixer().init_from_attention(None)
