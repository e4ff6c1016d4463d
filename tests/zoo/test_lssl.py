"""LSSL: equal to a plain loop of the paper's equations, and to S4 where both are HiPPO."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.long_conv import long_conv
from rnnzoo.zoo.lssl.configuration_lssl import LSSLConfig
from rnnzoo.zoo.lssl.modeling_lssl import LSSLForCausalLM, LSSLMixer
from rnnzoo.zoo.s4.configuration_s4 import S4Config
from rnnzoo.zoo.s4.hippo import HIPPO, dplr
from rnnzoo.zoo.s4.modeling_s4 import S4Mixer

from .state_spaces import plain_logits, random_model


def continuous(mixer: LSSLMixer):
    width = len(mixer.log_dt)
    a, b, c = (x.to(torch.complex128) for x in (mixer.A, mixer.B, mixer.C))
    return a.expand(width, -1, -1), b.expand(width, -1), c if c.ndim == 3 else c[:, None]


@pytest.mark.parametrize(("measure", "outputs"), [("legs", 1), ("legs", 3), ("legt", 1)])
@torch.no_grad()
def test_logits_are_those_of_a_plain_loop(measure, outputs):
    fields = {"lssl_init": measure, "lssl_outputs": outputs, "s4_state_size": 7}
    model, ids = random_model((LSSLConfig, LSSLForCausalLM), **fields)
    torch.testing.assert_close(model(ids).logits, plain_logits(model, ids, continuous), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_s4_is_the_same_state_space_in_another_basis():
    torch.manual_seed(0)
    sizes = {"hidden_size": 5, "num_hidden_layers": 1, "s4_state_size": 16}
    lssl, s4 = LSSLMixer(LSSLConfig(**sizes), 0).double(), S4Mixer(S4Config(**sizes), 0).double()
    for mixer in (lssl, s4):
        mixer.init_weights()
    s4.log_dt.copy_(lssl.log_dt)
    s4.C.copy_(torch.view_as_real(lssl.C.to(torch.complex128) @ dplr("legs", 16)[3]))

    def kernel(system: dict[str, torch.Tensor]) -> torch.Tensor:
        impulse = torch.zeros(1, 200, 5, dtype=torch.float64)
        impulse[:, 0] = 1
        return long_conv(impulse, **system)[0]

    torch.testing.assert_close(kernel(lssl.system()), kernel(s4.system()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_it_starts_from_hippo(measure):
    mixer = LSSLMixer(LSSLConfig(hidden_size=200, num_hidden_layers=1, lssl_init=measure), 0).double()
    mixer.init_weights()
    a, b = HIPPO[measure](64)
    torch.testing.assert_close(mixer.A.detach(), a)
    torch.testing.assert_close(mixer.B.detach(), b)
    dt = mixer.log_dt.exp()
    assert 0.001 <= dt.min() < 0.002 and 0.05 < dt.max() <= 0.1
    assert abs(mixer.C.square().mean() - 1) < 0.1


def test_a_step_of_an_optimizer_is_seen_by_the_next_call_without_gradients():
    model, ids = random_model((LSSLConfig, LSSLForCausalLM), s4_state_size=4)
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(model(ids).logits, before)
    for change in (lambda x: x.data.add_(0.01), lambda x: setattr(x, "data", x.data * 1.01)):
        for name in ("A", "B", "log_dt"):
            change(getattr(model.model.layers[0].mixer, name))
            with torch.no_grad():
                found = model(ids).logits
            torch.testing.assert_close(found, model(ids).logits.detach(), rtol=1e-12, atol=1e-12)
            assert not torch.allclose(found, before, rtol=1e-9)
            before = found


@pytest.mark.parametrize("fields", [{"lssl_init": "lmu"}, {"lssl_outputs": 0}, {"s4_state_size": 0}])
def test_options_that_it_does_not_have_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        LSSLConfig(hidden_size=8, num_hidden_layers=1, **fields)
