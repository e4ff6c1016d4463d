"""RWKV-5: the same numbers as the authors' package."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.importing import export_checkpoint
from rnnzoo.zoo.rwkv5.configuration_rwkv5 import RWKV5Config
from rnnzoo.zoo.rwkv5.modeling_rwkv5 import RWKV5ForCausalLM

from .rwkv_package import equal, ours_and_theirs


def test_the_authors_package_gives_equal_logits(tmp_path):
    equal(*ours_and_theirs("rwkv5", tmp_path, head_dim=16))


def test_initialisation_is_the_authors():
    model = RWKV5ForCausalLM(RWKV5Config(vocab_size=61, hidden_size=32, num_hidden_layers=3, head_dim=8))
    channel = torch.arange(32)
    mixer = model.model.layers[1].mixer
    torch.testing.assert_close(mixer.decay.flatten(), -6 + 5 * (channel / 31) ** 1.35)
    torch.testing.assert_close(mixer.bonus.flatten(), 0.5 * (1 - channel / 31) + ((channel + 1) % 3 - 1) * 0.1)
    share = (channel / 32) ** (2 / 3)
    torch.testing.assert_close(mixer.mix, torch.stack([share.sqrt(), share, share + 0.15, share.sqrt()]))
    torch.testing.assert_close(mixer.norm.weight, torch.full((32,), (2 / 3) ** 0.7))
    torch.testing.assert_close(mixer.proj.k_proj.weight @ mixer.proj.k_proj.weight.T, 0.01 * torch.eye(32))
    assert not mixer.proj.o_proj.weight.any() and not model.model.layers[1].mlp.value.weight.any()
    assert model.config.intermediate_size == 96  # 3.5 times the width in steps of 32


def test_a_formats_limits_are_named(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
    RWKV5ForCausalLM(RWKV5Config(**sizes, head_dim=8, num_key_value_heads=2)).save_pretrained(tmp_path / "grouped")
    with pytest.raises(RnnzooError, match="grouped heads"):
        export_checkpoint(tmp_path / "grouped", "rwkv", tmp_path / "out")
