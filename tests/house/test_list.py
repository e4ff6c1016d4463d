"""`rnnzoo list`: what every architecture is, and how large its published sizes are."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from rnnzoo.cli.list_command import _show_architectures, _show_sizes, facts, published_sizes
from rnnzoo.zoo.core.cache import RecurrentCache
from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.heads import RecurrentForCausalLM
from rnnzoo.zoo.core.registry import architectures
from rnnzoo.zoo.core.sizes import architecture_config, parameter_count, state_bytes, window_bytes


@pytest.mark.parametrize("name", architectures())
def test_every_architecture_says_what_it_is(name):
    known = facts(name)
    assert known["kernel"] and known["paper"] and known["summary"] and not known["summary"].endswith(".")
    assert " / " in known["complexity"]
    assert known["state_bytes"] > 0 or not known["complexity"].endswith("/ 1")


def test_what_it_can_be_made_from():
    mamba2 = facts("mamba2")
    assert mamba2["from_attention"] and "transformers" in mamba2["imports"]
    assert facts("supra")["imports"] == []


@pytest.mark.parametrize("name", architectures())
def test_published_sizes_are_configurations_and_weigh_what_their_names_say(name):
    cls = architecture_config(name)
    units = {"M": 10**6, "B": 10**9}
    for size, fields in cls.sizes.items():
        config = cls(**fields)
        assert parameter_count(config) > 0
        if size[-1] in units and size[:-1].replace(".", "").isdigit():
            named = float(size[:-1]) * units[size[-1]]
            assert 0.7 * named < parameter_count(config) < 1.4 * named, (size, parameter_count(config))


def test_a_state_that_grows_is_told():
    if "transformer" in architectures():
        assert all(size["growing_layers"] == size["layers"] for size in published_sizes("transformer").values())
        assert facts("transformer")["from_attention"]
    assert published_sizes("mamba2")["130M"]["growing_layers"] == 0


@pytest.mark.parametrize("types", [["mamba2", "supra"], ["hedgehog", "full_attention", "sliding_attention"]])
def test_sizes_told_in_advance_are_those_of_the_model_and_its_cache(types):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": len(types), "sliding_window": 4}
    config = RecurrentConfig(**sizes, layer_types=types, num_sinks=1, window_size=3, tie_word_embeddings=True)
    model = RecurrentForCausalLM(config).eval()
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    cache = RecurrentCache(config)
    model(torch.arange(12)[None], cache=cache)
    used = sum(state.num_bytes() for state, kind in zip(cache.states, types, strict=True) if kind != "full_attention")
    assert state_bytes(config, torch.float32) + window_bytes(config, torch.float32) == used


def drawn(show, value, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    show(value, console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width):
    lines = drawn(_show_architectures, {name: facts(name) for name in architectures()}, width)
    lines += drawn(_show_sizes, {"mamba2": published_sizes("mamba2"), "supra": {}}, width)
    assert max(map(len, lines)) <= width
    heads = [line for line in lines if not line.startswith(" ")]
    assert all(any(line.startswith(name) for line in heads) for name in architectures())
    assert lines[-1].startswith("No published sizes: ") and lines[-1].endswith("supra.")
