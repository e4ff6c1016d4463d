"""Aaren against softmax attention with one query, written out, and as a student of attention."""

from __future__ import annotations

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import ShapeError
from rnnzoo.zoo.aaren.configuration_aaren import AarenConfig
from rnnzoo.zoo.aaren.modeling_aaren import AarenMixer
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.core.model import RecurrentModel
from rnnzoo.zoo.transformer.configuration_transformer import TransformerConfig

HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4}
SIZES = {"vocab_size": 11, "hidden_size": 36, "num_hidden_layers": 1} | HEADS


def mixer_and_input(**fields) -> tuple[AarenMixer, torch.Tensor]:
    torch.manual_seed(0)
    mixer = AarenMixer(AarenConfig(**SIZES | fields), 0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return mixer.double(), torch.randn(2, 23, 36, dtype=torch.float64)


def run(mixer: AarenMixer, x: torch.Tensor) -> torch.Tensor:
    return mixer(x, None, RecurrentModel(mixer.config).make_context(*x.shape[:2], x.device))[0]


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True, "attention_bias": True}], ids=["plain", "norms and biases"])
@torch.no_grad()
def test_every_prefix_is_attention_with_one_query(fields):
    mixer, x = mixer_and_input(**fields)
    proj = mixer.proj
    q = proj.q_proj(mixer.query).view(9, 4)
    k, v = proj.k_proj(x).view(2, 23, 3, 4), proj.v_proj(x).view(2, 23, 3, 4)
    if fields:
        q, k = proj.q_norm(q), proj.k_norm(k)
    found = run(mixer, x)
    for t in (0, 1, 22):
        heads = []
        for h in range(9):
            weights = (k[:, : t + 1, h // 3] @ q[h] / 2).softmax(1)
            heads.append((weights[..., None] * v[:, : t + 1, h // 3]).sum(1))
        expected = proj.o_proj(torch.cat(heads, -1))
        torch.testing.assert_close(found[:, t], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_scores_of_any_size_are_averages():
    mixer, x = mixer_and_input()
    mixer.query.mul_(1e6)
    x = x.float()
    out = run(mixer.float(), x)
    assert out.isfinite().all() and out.abs().max() <= (
        mixer.proj.o_proj.weight.abs().sum() * mixer.proj.v_proj(x).abs().max()
    )


def test_a_layer_has_one_vector_more_than_attention():
    def count(config) -> int:
        model = transformers.AutoModelForCausalLM.from_config(config)
        return sum(x.numel() for x in model.model.layers[0].mixer.parameters())

    assert count(AarenConfig(**SIZES)) == count(TransformerConfig(**SIZES)) + 36


def test_the_query_starts_as_large_as_a_normed_token():
    torch.manual_seed(0)
    config = AarenConfig(vocab_size=7, hidden_size=576, num_hidden_layers=1)
    query = transformers.AutoModelForCausalLM.from_config(config).model.layers[0].mixer.query
    assert 0.9 < query.std() < 1.1


def test_a_student_of_attention_takes_its_matrices():
    torch.manual_seed(1)
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    mixer = AarenMixer(AarenConfig(**SIZES), 0)
    query = mixer.query.detach().clone()
    mixer.init_from_attention(AttentionWeights(q, k, v, o, 9, 3, 4))
    for name, expected in zip("qkvo", (q, k, v, o), strict=True):
        assert torch.equal(getattr(mixer.proj, f"{name}_proj").weight, expected)
    assert torch.equal(mixer.query, query)
    with pytest.raises(ShapeError, match="k_proj.bias"):
        mixer.init_from_attention(AttentionWeights(q, k, v, o, 9, 3, 4, k_bias=torch.zeros(12)))
