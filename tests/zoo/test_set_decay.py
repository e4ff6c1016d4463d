"""Decays that are set: a head forgets in a step what it was told to, and heads that share a state take the mean."""

from __future__ import annotations

import math

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.mixer import Mixer, shared_decay
from rnnzoo.zoo.core.registry import config_class, known_mixers, mixer_class

WITH_DECAY = {"gla", "mamba2", "gated_delta_net", "kda", "rwkv6", "rwkv7", "xlstm"}
HEADS, KV_HEADS, WIDTH = 6, 2, 8


def mixer_of(name: str) -> Mixer:
    cls = config_class(name)
    sizes = cls.student_fields(HEADS, KV_HEADS, WIDTH)
    config = cls(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        vocab_size=32,
        layer_types=[name],
        **sizes,
    )
    torch.manual_seed(0)
    mixer = mixer_class(name)(config, 0).double()
    mixer.init_weights()
    return mixer


def decay_of(name: str, mixer) -> torch.Tensor:
    """The log decay of a token without content, (heads, channels or 1)."""
    nothing = torch.zeros(1, 1, 48, dtype=torch.float64)
    if name == "mamba2":
        return (-torch.nn.functional.softplus(mixer.dt_bias) * mixer.A_log.exp())[:, None]
    if name == "rwkv6":
        return -mixer.decay(nothing).exp().view(mixer.heads, -1)
    if name == "rwkv7":
        return -math.exp(-0.5) * torch.sigmoid(mixer.decay(nothing)).view(mixer.heads, -1)
    if name == "xlstm":
        cap = mixer.config.xlstm_gate_cap
        return torch.nn.functional.logsigmoid(cap * torch.tanh(mixer.f_proj(nothing) / cap)).view(-1, 1)
    return mixer.log_decay(nothing)[0, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(WITH_DECAY))
def test_a_token_without_content_decays_as_was_set(name):
    mixer = mixer_of(name)
    wanted = -math.log(2) / torch.tensor([3.0, 20.0, 90.0, 8.0, 300.0, 40.0], dtype=torch.float64)
    mixer.set_decay(wanted)
    found = decay_of(name, mixer)
    expected = shared_decay(wanted, len(found))
    # Channels of a head may differ (KDA): then it is their mean.
    torch.testing.assert_close(found.mean(-1), expected, rtol=1e-5, atol=1e-9)


def test_shared_decay_is_the_geometric_mean_of_a_group():
    log_decay = -torch.tensor([1.0, 4.0, 0.5, 0.5])
    torch.testing.assert_close(shared_decay(log_decay, 2), -torch.tensor([2.0, 0.5]))
    assert torch.equal(shared_decay(log_decay, 4), log_decay)
    assert torch.equal(shared_decay(log_decay, 8), log_decay.repeat_interleave(2))


def test_mixers_without_such_a_decay_say_so():
    has = {name for name in known_mixers() if mixer_class(name).has_decay()}
    assert has == WITH_DECAY
    with pytest.raises(RnnzooError, match="A 'retnet' layer has no decay to set"):
        mixer_of("retnet").set_decay(torch.full((HEADS,), -0.1))
