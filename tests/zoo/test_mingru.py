"""minGRU: the paper's recurrence step by step, its form in log space, and its options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rnnzoo.zoo.core.recurrences import scan
from rnnzoo.zoo.mingru.configuration_mingru import MinGRUConfig
from rnnzoo.zoo.mingru.modeling_mingru import MinGRUForCausalLM


def made(**fields):
    """A model of one layer, its mixer, random hidden states and their context; all float64."""
    torch.manual_seed(3)
    config = MinGRUConfig(vocab_size=11, hidden_size=12, num_hidden_layers=1, initializer_range=0.7, **fields)
    model = MinGRUForCausalLM(config).double().eval()
    hidden = torch.randn(2, 23, 12, dtype=torch.float64)
    return model.model.layers[0].mixer, hidden, model.model.make_context(2, 23, hidden.device)


def g(x):
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


@torch.no_grad()
@pytest.mark.parametrize("taps", [0, 4])
def test_it_is_the_papers_recurrence(taps):
    mixer, hidden, ctx = made(minrnn_conv_kernel=taps, minrnn_expand=3)
    u = hidden
    if taps:
        u = mixer.conv1d(F.pad(hidden.mT, (taps - 1, 0))).mT
    w_z, w_h = mixer.in_proj.weight.split(36)
    b_z, b_h = mixer.in_proj.bias.split(36)
    h, out = torch.zeros(2, 36, dtype=torch.float64), []
    for t in range(23):
        z = torch.sigmoid(u[:, t] @ w_z.T + b_z)
        h = (1 - z) * h + z * g(u[:, t] @ w_h.T + b_h)
        out.append(mixer.out_proj(h))
    torch.testing.assert_close(mixer(hidden, None, ctx)[0], torch.stack(out, 1), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_it_equals_the_papers_form_in_log_space():
    mixer, hidden, ctx = made(minrnn_conv_kernel=0)
    k, pre = mixer.in_proj(hidden).chunk(2, -1)
    log_values = -F.softplus(-k) + g(pre).log()
    kept = (-F.softplus(k)).cumsum(1)
    h = (kept + torch.logcumsumexp(log_values - kept, 1)).exp()
    torch.testing.assert_close(mixer(hidden, None, ctx)[0], mixer.out_proj(h), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_gates_that_are_shut_stay_finite():
    mixer, _, ctx = made()
    for extreme in (-1e4, 1e4):
        keep, take = mixer.factors(torch.full((2, 23, 24), extreme))
        assert torch.equal(keep + take, torch.ones(2, 23, 24))
        assert scan(keep, take, None, ctx)[0].isfinite().all()


def test_sizes_without_sense_are_refused():
    with pytest.raises(ValueError, match="minrnn_expand"):
        MinGRUConfig(hidden_size=32, num_hidden_layers=1, minrnn_expand=0)
    assert MinGRUForCausalLM(MinGRUConfig(**MinGRUConfig.sizes["Shakespeare"])).num_parameters() > 2e6
