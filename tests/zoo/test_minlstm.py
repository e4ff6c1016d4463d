"""minLSTM: the paper's recurrence step by step, and its forget gate at the start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rnnzoo.zoo.minlstm.configuration_minlstm import MinLSTMConfig
from rnnzoo.zoo.minlstm.modeling_minlstm import MinLSTMForCausalLM

SIZES = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 1}


@torch.no_grad()
def test_it_is_the_papers_recurrence_with_gates_that_sum_to_one():
    torch.manual_seed(3)
    model = MinLSTMForCausalLM(MinLSTMConfig(**SIZES, initializer_range=0.7, minlstm_forget_bias=1.5)).double().eval()
    mixer = model.model.layers[0].mixer
    hidden = torch.randn(2, 23, 12, dtype=torch.float64)
    u = mixer.conv1d(F.pad(hidden.mT, (3, 0))).mT
    w_f, w_i, w_h = mixer.in_proj.weight.split(24)
    b_f, b_i, b_h = mixer.in_proj.bias.split(24)
    h, out = torch.zeros(2, 24, dtype=torch.float64), []
    for t in range(23):
        f, i = torch.sigmoid(u[:, t] @ w_f.T + b_f), torch.sigmoid(u[:, t] @ w_i.T + b_i)
        pre = u[:, t] @ w_h.T + b_h
        h = f / (f + i) * h + i / (f + i) * torch.where(pre >= 0, pre + 0.5, torch.sigmoid(pre))
        out.append(mixer.out_proj(h))
    ctx = model.model.make_context(2, 23, hidden.device)
    torch.testing.assert_close(mixer(hidden, None, ctx)[0], torch.stack(out, 1), rtol=1e-9, atol=1e-9)


def test_gates_that_are_both_shut_are_still_normalised():
    mixer = MinLSTMForCausalLM(MinLSTMConfig(**SIZES)).model.layers[0].mixer
    shut = torch.full((1, 1, 24), -1e4)  # f = i = 0 in float32: f / (f + i) is undefined
    keep, take = mixer.factors(shut, shut)
    assert torch.equal(keep, torch.full_like(shut, 0.5)) and torch.equal(take, keep)


def test_the_forget_gate_starts_where_asked():
    bias = MinLSTMForCausalLM(MinLSTMConfig(**SIZES, minlstm_forget_bias=2.0)).model.layers[0].mixer.in_proj.bias
    assert torch.equal(bias[:24], torch.full((24,), 2.0)) and not bias[24:].any()
    with pytest.raises(ValueError, match="minrnn_bias"):
        MinLSTMConfig(**SIZES, minlstm_forget_bias=2.0, minrnn_bias=False)
