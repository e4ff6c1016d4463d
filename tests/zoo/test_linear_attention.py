"""Linear attention: the equations of the paper, one step at a time."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.errors import ShapeError
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.linear_attention.configuration_linear_attention import LinearAttentionConfig
from rnnzoo.zoo.linear_attention.modeling_linear_attention import LinearAttentionMixer, LinearAttentionModel

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 6}
PHI = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
    "identity": lambda x: x,
}


def by_hand(mixer: LinearAttentionMixer, x: torch.Tensor) -> torch.Tensor:
    """Equations 16 to 20, head by head and token by token; x (T, D)."""
    config, out = mixer.config, []
    heads, d = config.num_attention_heads, config.head_dim
    group = heads // config.num_key_value_heads
    phi = PHI[config.linear_feature_map]
    q, k, v = (x @ getattr(mixer.proj, f"{name}_proj").weight.T for name in "qkv")
    for h in range(heads):
        own, shared = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
        s, z, outputs = torch.zeros(d, d, dtype=x.dtype), torch.zeros(d, dtype=x.dtype), []
        for t in range(len(x)):
            key, query = phi(k[t, shared]), phi(q[t, own])
            s, z = s + torch.outer(key, v[t, shared]), z + key
            o = query @ s
            if config.linear_normalizer == "sum":
                o = o / (query @ z) if query @ z != 0 else o
            else:
                o = o / d**0.5
                o = mixer.norm.weight * o / (o.square().mean() + config.rms_norm_eps).sqrt()
            outputs.append(o)
        out.append(torch.stack(outputs))
    return torch.cat(out, 1) @ mixer.proj.o_proj.weight.T


@pytest.mark.parametrize(("phi", "normalizer"), [("elu", "sum"), ("relu", "sum"), ("relu", "rms"), ("identity", "rms")])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_it_computes_the_equations_of_the_paper(phi, normalizer, kv_heads):
    torch.manual_seed(0)
    fields = {"linear_feature_map": phi, "linear_normalizer": normalizer, "initializer_range": 0.3}
    config = LinearAttentionConfig(**SIZES, num_key_value_heads=kv_heads, **fields)
    model = LinearAttentionModel(config).double()
    mixer = model.layers[0].mixer
    x = torch.randn(2, 19, 24, dtype=torch.float64)
    y, _ = mixer(x, None, model.make_context(2, 19, x.device))
    for row in range(2):
        torch.testing.assert_close(y[row], by_hand(mixer, x[row]), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_elu_map_keeps_small_weights_in_bfloat16():
    model = LinearAttentionModel(LinearAttentionConfig(**SIZES)).bfloat16()
    proj = model.layers[0].mixer.proj
    proj.k_proj.weight.copy_(-20 * torch.eye(24))  # phi(k) = exp(-20), far below the spacing of bfloat16 at 1
    x = torch.ones(1, 5, 24, dtype=torch.bfloat16)
    y, _ = model.layers[0].mixer(x, None, model.make_context(1, 5, x.device))
    expected = proj.o_proj(proj.v_proj(x))  # all tokens alike: their average is each of them
    torch.testing.assert_close(y, expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linear_feature_map": "cosine"}, "linear_feature_map must be one of"),
        ({"linear_normalizer": "max"}, "linear_normalizer must be one of"),
        ({"linear_feature_map": "identity"}, "use linear_normalizer='rms'"),
    ],
)
def test_wrong_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LinearAttentionConfig(**SIZES, **fields)


def test_it_takes_a_teachers_matrices_biases_and_norms():
    config = LinearAttentionConfig(**SIZES, num_key_value_heads=2, attention_bias=True, qk_norm=True)
    mixer = LinearAttentionMixer(config, 0)
    sizes = {"q": (24, 24), "k": (12, 24), "v": (12, 24), "o": (24, 24)}
    matrices = {name: torch.randn(size) for name, size in sizes.items()}
    extra = {"q_bias": torch.randn(24), "k_bias": torch.randn(12), "v_bias": torch.randn(12)}
    extra |= {"q_norm": torch.rand(6), "k_norm": torch.rand(6)}
    weights = AttentionWeights(**matrices, num_heads=4, num_kv_heads=2, head_dim=6, **extra)
    mixer.init_from_attention(weights)
    for name, expected in matrices.items():
        assert torch.equal(getattr(mixer.proj, f"{name}_proj").weight, expected)
    assert torch.equal(mixer.proj.k_proj.bias, extra["k_bias"])
    assert torch.equal(mixer.proj.q_norm.weight, extra["q_norm"])
    with pytest.raises(ShapeError, match="bias"):
        LinearAttentionMixer(LinearAttentionConfig(**SIZES, num_key_value_heads=2), 0).init_from_attention(weights)
