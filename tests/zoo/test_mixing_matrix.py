"""The matrix with which a mixer sums values over time: with it and the rest of the layer, the layer's own output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rnnzoo.kernels.errors import RnnzooError

TIME = 11
SEQ_IDS = torch.tensor([[0] * 5 + [1] * 6, [0] * TIME])
MASK = torch.tensor([[True] * TIME, [False] * 2 + [True] * 9])


def times(matrix: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """M (B, H, T, T) on v (B, T, Hv, V), repeated for the heads of M: (B, T, H, V)."""
    return torch.einsum("bhts,bshv->bthv", matrix, v.repeat_interleave(matrix.shape[1] // v.shape[2], 2))


def attention(mixer, hidden, ctx, matrix):
    return mixer.proj.o_proj(times(matrix, mixer.proj.split(hidden)[2]).flatten(-2))


def linear(mixer, hidden, ctx, matrix):
    return mixer.proj.o_proj(mixer.output(times(matrix, mixer.proj.split(hidden)[2]), hidden))


def supra(mixer, hidden, ctx, matrix):
    o = times(matrix, mixer.proj.split(hidden)[2])
    return mixer.proj.o_proj(F.layer_norm(o, o.shape[-1:]).flatten(-2))


def mamba2(mixer, hidden, ctx, matrix):
    z, x, *_ = mixer._inputs(hidden, None, ctx)
    return mixer.out_proj(mixer.norm(times(matrix, x).flatten(-2), z))


def phi_mamba(mixer, hidden, ctx, matrix):
    x = mixer.proj(hidden, None, ctx)[2]
    return mixer.proj.o_proj(times(matrix, x).flatten(-2) * F.silu(mixer.gate(hidden)))


LAYERS = {
    "full_attention": attention,
    "sliding_attention": attention,
    "linear_attention": linear,
    "gla": linear,
    "retnet": linear,
    "based": linear,
    "supra": supra,
    "mamba2": mamba2,
    "phi_mamba": phi_mamba,
    "hedgehog": attention,
    "liger": attention,
}


def layer_of(make_model, name: str):
    model = make_model((name,)).model
    torch.manual_seed(4)
    return model, model.layers[0].mixer, torch.randn(2, TIME, model.config.hidden_size, dtype=torch.float64)


@pytest.mark.parametrize("columns", [{}, {"seq_ids": SEQ_IDS}, {"mask": MASK}], ids=["plain", "documents", "padding"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_the_matrix_on_the_values_is_the_layers_output(make_model, name, columns):
    model, mixer, hidden = layer_of(make_model, name)
    ctx = model.make_context(2, TIME, hidden.device, **columns)
    matrix = mixer.mixing_matrix(hidden, ctx)
    assert not matrix.triu(1).any()
    rows = columns.get("mask", torch.ones(2, TIME, dtype=torch.bool))
    expected, _ = mixer(hidden, None, ctx)
    torch.testing.assert_close(LAYERS[name](mixer, hidden, ctx, matrix)[rows], expected[rows], rtol=1e-9, atol=1e-9)
    if "seq_ids" in columns:
        assert not matrix[0, :, 5:, :5].any() and matrix[1, :, 5:, :5].any(-1).any()


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_matrix_reach_what_makes_it(make_model, name):
    model, mixer, hidden = layer_of(make_model, name)
    matrix = mixer.mixing_matrix(hidden, model.make_context(2, TIME, hidden.device))
    matrix.square().sum().backward()
    made = [mixer.in_proj.weight] if name == "mamba2" else [mixer.proj.q_proj.weight, mixer.proj.k_proj.weight]
    assert all(weight.grad.abs().sum() > 0 for weight in made)


@torch.no_grad()
def test_rows_of_attention_sum_to_one_and_a_window_ends(make_model):
    model, mixer, hidden = layer_of(make_model, "sliding_attention")
    matrix = mixer.mixing_matrix(hidden, model.make_context(2, TIME, hidden.device))
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    assert torch.equal(matrix[0, 0] > 0, torch.ones(TIME, TIME).tril().triu(-3).bool())


def test_a_mixer_without_one_says_so(make_model):
    model, mixer, hidden = layer_of(make_model, "lru")
    with pytest.raises(RnnzooError, match="'lru' layer has no mixing matrix"):
        mixer.mixing_matrix(hidden, model.make_context(2, TIME, hidden.device))
