"""Hawk: the paper's recurrence step by step, where it starts, and the student of an attention layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rnnzoo.kernels.errors import ShapeError
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.hawk.configuration_hawk import HawkConfig
from rnnzoo.zoo.hawk.modeling_hawk import HawkForCausalLM, HawkMixer


def model(**fields) -> HawkForCausalLM:
    torch.manual_seed(3)
    sizes = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 1}
    return HawkForCausalLM(HawkConfig(**(sizes | fields))).eval()


@torch.no_grad()
def test_it_is_the_papers_recurrence_and_starts_anew_with_a_document():
    made = model(rglru_width=18, rglru_blocks=3, rglru_init_variance=1.0).double()
    mixer, hidden = made.model.layers[0].mixer, torch.randn(2, 29, 12, dtype=torch.float64)
    for name, parameter in mixer.named_parameters():
        if "bias" in name:
            parameter.normal_()
    lru, h, out = mixer.rg_lru, torch.zeros(2, 18, dtype=torch.float64), []
    matrices = {name: torch.block_diag(*getattr(lru, f"{name}_gate_weight")) for name in ("input", "recurrent")}
    documents = torch.tensor([0] * 11 + [1] * 18)
    taps = torch.zeros(2, 4, 18, dtype=torch.float64)
    for t in range(29):
        first = t in (0, 11)
        taps = torch.cat([torch.zeros_like(taps) if first else taps, mixer.linear_x(hidden[:, t : t + 1])], 1)[:, -4:]
        u = (taps * mixer.conv_1d.weight[:, 0].T).sum(1) + mixer.conv_1d.bias
        r = torch.sigmoid(u @ matrices["recurrent"] + lru.recurrent_gate_bias.flatten())
        i = torch.sigmoid(u @ matrices["input"] + lru.input_gate_bias.flatten())
        a = torch.sigmoid(-lru.recurrent_param) ** (8 * r)
        h = i * u if first else a * h + (1 - a**2).sqrt() * i * u
        out.append(mixer.linear_out(h * F.gelu(mixer.linear_y(hidden[:, t]), approximate="tanh")))
    ctx = made.model.make_context(2, 29, hidden.device, seq_ids=documents.expand(2, -1))
    torch.testing.assert_close(mixer(hidden, None, ctx)[0], torch.stack(out, 1), rtol=1e-9, atol=1e-9)


def test_decays_start_on_the_ring_and_matrices_at_the_sources_variances():
    mixer = model(hidden_size=64, rglru_width=4096, rglru_blocks=16).model.layers[0].mixer
    decay = torch.sigmoid(-mixer.rg_lru.recurrent_param)
    assert decay.min() >= 0.8999 and decay.max() <= 0.9991
    share = (decay**2 - 0.9**2) / (0.999**2 - 0.9**2)
    assert abs(share.mean() - 0.5) < 0.03 and abs(share.var() - 1 / 12) < 0.01
    assert mixer.rg_lru.input_gate_weight.std().item() == pytest.approx((0.01 / 256) ** 0.5, rel=0.02)
    assert mixer.conv_1d.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert mixer.linear_x.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert mixer.linear_out.weight.std().item() == pytest.approx((2 / 4096) ** 0.5, rel=0.02)
    assert not mixer.linear_x.bias.any() and not mixer.conv_1d.bias.any()


def test_the_gradient_is_finite_where_the_decay_is_one():
    lru = model().model.layers[0].mixer.rg_lru
    u = torch.full((1, 3, 12), 1e4, requires_grad=True)
    lru.recurrent_gate_weight.data.fill_(-1.0)  # r = 0: a = 1, and the root of 1 - a^2 has no derivative
    a, x = lru(u, torch.zeros(1, 3, dtype=torch.bool))
    assert torch.equal(a, torch.ones_like(a))
    x.sum().backward()
    assert all(p.grad.isfinite().all() for p in (u, *lru.parameters()))


def test_a_student_takes_v_for_every_query_head_and_o():
    config = HawkConfig(vocab_size=11, hidden_size=36, num_hidden_layers=1, **HawkConfig.student_fields(9, 3, 4))
    mixer = HawkMixer(config, 0)
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    v_bias = torch.randn(12)
    mixer.init_from_attention(AttentionWeights(q, k, v, o, 9, 3, 4, v_bias=v_bias))
    for head in range(9):
        ours, theirs = slice(4 * head, 4 * head + 4), slice(4 * (head // 3), 4 * (head // 3) + 4)
        assert torch.equal(mixer.linear_x.weight[ours], v[theirs]) and torch.equal(
            mixer.linear_x.bias[ours], v_bias[theirs]
        )
    assert torch.equal(mixer.linear_out.weight, o) and not mixer.linear_out.bias.any()
    assert torch.equal(mixer.conv_1d.weight[0, 0], torch.tensor([0.0, 0.0, 0.0, 1.0]))
    with pytest.raises(ShapeError, match="linear_x"):
        HawkMixer(HawkConfig(hidden_size=32, num_hidden_layers=1), 0).init_from_attention(
            AttentionWeights(q, k, v, o, 9, 3, 4)
        )


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="rglru_blocks"):
        HawkConfig(hidden_size=32, num_hidden_layers=1, rglru_blocks=5)
