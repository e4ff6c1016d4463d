"""SUPRA: the recurrence of the paper, for any number of heads."""

from __future__ import annotations

import math

import pytest
import torch

from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.core.model import RecurrentModel
from rnnzoo.zoo.supra.configuration_supra import SupraConfig
from rnnzoo.zoo.supra.modeling_supra import SupraMixer, alibi_slopes


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7, 8, 9, 12, 14, 15, 16, 40, 71])
def test_slopes_exist_for_any_number_of_heads(heads):
    slopes = alibi_slopes(heads)
    assert len(slopes) == len(set(slopes)) == heads
    assert all(0 < s < 1 for s in slopes)


def test_slopes_are_those_of_alibi():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    extra = [2.0 ** (-(i + 0.5)) for i in range(4)]
    assert alibi_slopes(12) == pytest.approx([2.0**-i for i in range(1, 9)] + extra)


@torch.no_grad()
def test_the_layer_is_the_papers_recurrence():
    torch.manual_seed(0)
    heads, kv_heads, width, time = 9, 3, 4, 7
    config = SupraConfig(
        vocab_size=11, hidden_size=36, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    model = RecurrentModel(config).double()
    mixer: SupraMixer = model.layers[0].mixer
    teacher = AttentionWeights(
        q=torch.randn(36, 36).double(),
        k=torch.randn(12, 36).double(),
        v=torch.randn(12, 36).double(),
        o=torch.randn(36, 36).double(),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
    )
    mixer.init_from_attention(teacher)
    x = torch.randn(1, time, 36).double()
    actual, _ = mixer(x, None, model.make_context(1, time, x.device))

    def rotate(vector, position):  # pairs (i, i + width / 2), as Llama
        out = vector.clone()
        for i in range(width // 2):
            angle = position * float(torch.tensor(10000.0 ** (-2 * i / width)))
            a, b = vector[i], vector[i + width // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    phi = lambda vector: (mixer.phi.weight @ vector + mixer.phi.bias).relu()  # noqa: E731
    outputs = []
    for h in range(heads):
        kv, state, rows = h // (heads // kv_heads), torch.zeros(width, width).double(), []
        gamma = math.exp(-alibi_slopes(heads)[h])
        for t in range(time):
            q = (teacher.q @ x[0, t])[h * width : (h + 1) * width]
            k = (teacher.k @ x[0, t])[kv * width : (kv + 1) * width]
            v = (teacher.v @ x[0, t])[kv * width : (kv + 1) * width]
            state = gamma * state + torch.outer(rotate(phi(k), t), v) / width**0.5
            rows.append(rotate(phi(q), t) @ state)
        outputs.append(torch.stack(rows))
    normed = torch.nn.functional.group_norm(torch.cat(outputs, 1), heads, eps=1e-5)
    torch.testing.assert_close(actual[0], normed @ teacher.o.T, rtol=1e-5, atol=1e-5)
