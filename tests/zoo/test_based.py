"""Based: the Taylor series of softmax attention, computed from all pairs of tokens."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.errors import ShapeError
from rnnzoo.zoo.based.configuration_based import BasedConfig
from rnnzoo.zoo.based.modeling_based import BasedMixer, BasedModel
from rnnzoo.zoo.core.mixer import AttentionWeights

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 6}


def pairs(mixer: BasedMixer, x: torch.Tensor, weight) -> torch.Tensor:
    """Attention with `weight` of the scaled products; x (T, D)."""
    heads, kv_heads = mixer.config.num_attention_heads, mixer.config.num_key_value_heads
    q, k, v = (x @ getattr(mixer.proj, f"{name}_proj").weight.T for name in "qkv")
    q = q.unflatten(-1, (heads, -1))
    k, v = (y.unflatten(-1, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 1) for y in (k, v))
    weights = weight(torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5).tril()
    o = torch.einsum("hij,jhv->ihv", weights / weights.sum(-1, keepdim=True), v)
    return o.flatten(1) @ mixer.proj.o_proj.weight.T


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("feature_dim", [1, 5, 16])
@torch.no_grad()
def test_it_is_attention_with_the_taylor_series_of_the_exponential(kv_heads, feature_dim):
    torch.manual_seed(0)
    fields = {"num_key_value_heads": kv_heads, "based_feature_dim": feature_dim, "initializer_range": 0.3}
    model = BasedModel(BasedConfig(**SIZES, **fields)).double()
    mixer, x = model.layers[0].mixer, torch.randn(2, 19, 24, dtype=torch.float64)
    y, _ = mixer(x, None, model.make_context(2, 19, x.device))
    for row in range(2):
        expected = pairs(mixer, x[row], lambda s: 1 + s + s**2 / 2)
        torch.testing.assert_close(y[row], expected, rtol=1e-9, atol=1e-9)


def test_the_state_of_a_head_has_one_row_for_each_different_product():
    mixer = BasedMixer(BasedConfig(**SIZES), 0)
    assert mixer.init_state(2, torch.device("cpu"), torch.bfloat16).s.shape == (2, 4, 153, 7)


@torch.no_grad()
def test_a_student_starts_close_to_its_teachers_softmax():
    torch.manual_seed(0)
    q, k, v, o = 0.05 * torch.randn(4, 24, 24, dtype=torch.float64)  # scores of about 0.06
    weights = AttentionWeights(q, k, v, o, 4, 4, 6)
    model = BasedModel(BasedConfig(**SIZES, **BasedConfig.student_fields(4, 4, 6))).double()
    mixer, x = model.layers[0].mixer, torch.randn(1, 19, 24, dtype=torch.float64)
    mixer.init_from_attention(weights)
    for name, matrix in zip("qkvo", (q, k, v, o), strict=True):
        assert torch.equal(getattr(mixer.proj, f"{name}_proj").weight, matrix)
    y, _ = mixer(x, None, model.make_context(1, 19, x.device))
    softmax = pairs(mixer, x[0], torch.exp)
    assert (y[0] - softmax).norm() < 1e-3 * softmax.norm()  # the series lacks s^3 / 6
    with pytest.raises(ShapeError, match="q_proj"):
        BasedMixer(BasedConfig(**SIZES), 0).init_from_attention(weights)


@torch.no_grad()
def test_its_convolution_gates_a_few_tokens():
    torch.manual_seed(0)
    config = BasedConfig(**SIZES, layer_types=["based.convolution"], based_conv_width=10, initializer_range=0.3)
    model = BasedModel(config).double()
    mixer, x = model.layers[0].mixer, torch.randn(1, 9, 24, dtype=torch.float64)
    mixer.in_proj.bias.uniform_(-1, 1)
    y, _ = mixer(x, None, model.make_context(1, 9, x.device))
    u, gate = (x[0] @ mixer.in_proj.weight.T + mixer.in_proj.bias).split(10, -1)
    for t in range(9):
        taps = [(t - 2 + j, mixer.conv1d.weight[:, 0, j]) for j in range(3)]
        z = sum(weight * u[i] for i, weight in taps if i >= 0)
        expected = (z * torch.sigmoid(z) * gate[t]) @ mixer.out_proj.weight.T + mixer.out_proj.bias
        torch.testing.assert_close(y[0, t], expected, rtol=1e-9, atol=1e-9)
    assert mixer.conv1d.weight.abs().max() <= 3**-0.5


@pytest.mark.parametrize("size", BasedConfig.sizes)
def test_the_papers_sizes_are_a_mix_of_three_kinds_of_layers(size):
    types = BasedConfig(**BasedConfig.sizes[size]).layer_types
    assert types[:4] == ["based.convolution", "based", "sliding_attention", "based.convolution"]
    assert types.count("based") == types.count("sliding_attention") == {"360M": 5, "1.3B": 7}[size]


@pytest.mark.parametrize("name", ["based_feature_dim", "based_conv_width", "based_conv_kernel"])
def test_wrong_options_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        BasedConfig(**SIZES, **{name: 0})
