"""The block-diagonal linear RNN against a plain loop, and what its transitions can do."""

from __future__ import annotations

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.block_lrnn.configuration_block_lrnn import BlockLRNNConfig
from rnnzoo.zoo.block_lrnn.modeling_block_lrnn import BlockLRNNMixer
from rnnzoo.zoo.core.model import RecurrentModel


def mixer_and_input(**fields) -> tuple[BlockLRNNMixer, torch.Tensor]:
    torch.manual_seed(0)
    mixer = BlockLRNNMixer(BlockLRNNConfig(vocab_size=7, num_hidden_layers=1, **fields), 0)
    mixer.init_weights()
    return mixer.double(), torch.randn(2, 45, fields["hidden_size"], dtype=torch.float64)


def run(mixer: BlockLRNNMixer, x: torch.Tensor) -> torch.Tensor:
    return mixer(x, None, RecurrentModel(mixer.config).make_context(*x.shape[:2], x.device))[0]


def loop(mixer: BlockLRNNMixer, x: torch.Tensor, width: int, p: float) -> torch.Tensor:
    """The paper's recurrence and the authors' order of operations, number by number where it is short."""
    blocks = mixer.start.shape[0]
    m = mixer.transition_out(mixer.transition_in(x).clamp(min=0)).view(*x.shape[:2], blocks, width, width)
    u = mixer.value_out(mixer.value_in(x).clamp(min=0)).view(*x.shape[:2], blocks, width)
    rows = []
    for b in range(x.shape[0]):
        h = [mixer.start[i] for i in range(blocks)]
        for t in range(x.shape[1]):
            for i in range(blocks):
                block = m[b, t, i] - m[b, t, i].sum(0) / width
                longest = max(
                    sum(block[row, column].abs() ** p for row in range(width)) ** (1 / p) for column in range(width)
                )
                h[i] = (block / longest) @ h[i] + u[b, t, i]
            rows.append(torch.cat(h))
    y = torch.stack(rows).view(*x.shape[:2], -1)
    return y if mixer.out_proj is None else mixer.out_proj(y)


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": 16}, {"hidden_size": 9, "block_lrnn_block_size": 4, "block_lrnn_norm": 2.0}],
    ids=["as published", "padded blocks"],
)
@torch.no_grad()
def test_it_is_the_papers_loop(fields):
    mixer, x = mixer_and_input(**fields)
    expected = loop(mixer, x[:, :13], mixer.width, mixer.config.block_lrnn_norm)
    torch.testing.assert_close(run(mixer, x[:, :13]), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_longest_column_of_a_block_has_norm_one_and_none_a_mean():
    mixer, x = mixer_and_input(hidden_size=32)
    a = mixer._transitions(x)
    assert a.shape == (2, 45, 4, 8, 8)
    torch.testing.assert_close(a.mean(-2), torch.zeros(2, 45, 4, 8, dtype=torch.float64))
    norms = (a.abs() ** 1.2).sum(-2) ** (1 / 1.2)
    torch.testing.assert_close(norms.amax(-1), torch.ones(2, 45, 4, dtype=torch.float64))


def test_transitions_without_variation_give_finite_gradients():
    mixer, x = mixer_and_input(hidden_size=16)
    with torch.no_grad():
        mixer.transition_out.weight.zero_()
        mixer.transition_out.bias.fill_(1.0)
    run(mixer, x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    config = BlockLRNNConfig(vocab_size=7, hidden_size=64, num_hidden_layers=1, initializer_range=9.0)
    mixer = transformers.AutoModelForCausalLM.from_config(config).model.layers[0].mixer
    assert mixer.transition_in.weight.shape == (512, 64) and mixer.transition_out.weight.shape == (512, 512)
    assert 0.99 / 8 < mixer.transition_in.weight.abs().max() <= 1 / 8
    assert 0.99 / 512**0.5 < mixer.transition_out.weight.abs().max() <= 1 / 512**0.5
    assert 0.7 < mixer.start.std() < 1.3


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="block_lrnn_block_size"):
        BlockLRNNConfig(hidden_size=32, num_hidden_layers=1, block_lrnn_block_size=1)
    with pytest.raises(ValueError, match="block_lrnn_norm"):
        BlockLRNNConfig(hidden_size=32, num_hidden_layers=1, block_lrnn_norm=0.5)
    with pytest.raises(RnnzooError, match="cannot be started from an attention layer"):
        mixer_and_input(hidden_size=16)[0].init_from_attention(None)
