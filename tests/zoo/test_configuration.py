"""A configuration keeps what it is given: in every pair of architectures, through building, saving and loading."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import types
import typing
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.registry import architectures, config_class

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GIVEN = {*SIZES, "layer_types", *(field.name for field in dataclasses.fields(PreTrainedConfig))}
CORE = {field.name for field in dataclasses.fields(RecurrentConfig)}
DERIVED_IF_NONE = {"num_key_value_heads", "embedding_scale"}  # where the architecture has another default than None
VALUES: dict[Any, list[Any]] = {
    bool: [True, False],
    int: [1, 2, 3, 4, 6, 8],
    float: [0.5, 0.25, 0.0625, 1.5, 3.0, -0.5],
    str: "rms layer gated plain relu silu sigmoid none legs legt inv lin zoh bilinear prototype elu identity".split(),
    dict: [{"rope_theta": 500.0, "rope_type": "default"}],
    list: [[4, 8], [8, 4], [0.5, 1.5], [[1, 2], [3, 4]], [[1, 2, 3, 4], [4, 3, 2, 1]]],
    type(None): [None],
}


def possible(field: dataclasses.Field[Any], choice: random.Random) -> list[Any]:
    """Values of a field's type that are not its default, in random order; few of them are valid for any one field."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    found = [value for kind in kinds for value in VALUES.get(typing.get_origin(kind) or kind, [])]
    found = [x for x in found if x != field.default and not (x is None and field.name in DERIVED_IF_NONE)]
    return choice.sample(found, len(found))


def built(name: str, values: dict[str, Any]) -> RecurrentConfig | None:
    """None for values that do not fit together, such as more groups than heads."""
    try:
        return config_class(name)(**SIZES | values)
    except (ValueError, StrictDataclassError):
        return None


@functools.cache
def valid_values(name: str, seed: int) -> dict[str, Any]:
    """Another value than the default for as many fields of an architecture as possible, all at once."""
    choice, values = random.Random(f"{name} {seed}"), {}
    own = [field for field in dataclasses.fields(config_class(name)) if field.name not in GIVEN]
    for field in choice.sample(own, len(own)):
        fitting = (x for x in possible(field, choice) if built(name, values | {field.name: x}) is not None)
        for value in itertools.islice(fitting, 1):
            values[field.name] = value
    assert len(values) >= len(own) - 2
    return values


def loaded(config: RecurrentConfig) -> RecurrentConfig:
    return type(config).from_dict(json.loads(config.to_json_string()))


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))  # of transformers' fields, some have keys that are numbers


def partners(name: str) -> list[str]:
    """Over all architectures, every pair once: in half of them an architecture is the first."""
    own = architectures().index(name)
    return [other for i, other in enumerate(architectures()) if other != name and ((own + i) % 2 == 0) == (own < i)]


@pytest.mark.parametrize("name", architectures())
def test_any_field_set_to_any_valid_value_survives_in_every_pair_of_architectures(name):
    for other in partners(name):
        wanted = {key: value for key, value in valid_values(other, 2).items() if key not in CORE} | valid_values(
            name, 1
        )
        values = {"layer_types": [name, other]} | wanted
        if built(name, values) is None:  # not all that two architectures can be fits together
            values = {"layer_types": [name, other]}
            for key, value in wanted.items():
                values |= {key: value} if built(name, values | {key: value}) is not None else {}
        config = built(name, values)
        assert config is not None and len(values) >= len(wanted) - 2
        again = loaded(config)
        for found in (config, again):
            assert {key: plain(getattr(found, key)) for key in values} == plain(values), other
        assert plain(again.to_dict()) == plain(config.to_dict()), other


def test_every_field_is_set_to_something_by_the_test_above():
    always_derived = {"lru_r_min", "mamba_kv_groups", "minrnn_bias"}  # need another field at the same time
    for name in architectures():
        fields = {field.name for field in dataclasses.fields(config_class(name))} - GIVEN
        assert fields - {*valid_values(name, 1), *valid_values(name, 2)} <= always_derived, name


def test_a_field_that_architectures_share_keeps_the_users_value(tmp_path):
    config = config_class("gla")(
        **{**SIZES, "num_hidden_layers": 3}, layer_types=["gla", "mamba", "mamba2"], ssm_expand=4, ssm_conv_kernel=3
    )
    config.save_pretrained(tmp_path)
    for found in (config, AutoConfig.from_pretrained(tmp_path)):
        assert (found.ssm_expand, found.ssm_conv_kernel) == (4, 3)
        assert (found.mamba_inner_size, found.ssm_num_heads * found.ssm_head_dim) == (128, 128)


def test_architectures_that_share_a_field_declare_the_same_default():
    """So it does not matter which of them `layer_types` names first."""
    defaults: dict[str, set[str]] = {}
    for name in architectures():
        for field in dataclasses.fields(config_class(name)):
            if field.name not in CORE:
                defaults.setdefault(field.name, set()).add(f"{field.default!r} {field.default_factory!r} {field.type}")
    assert {name: found for name, found in defaults.items() if len(found) > 1} == {}


def test_a_configuration_of_an_earlier_version_loads_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EARLIER))
    config = AutoConfig.from_pretrained(tmp_path)
    assert {key: plain(getattr(config, key)) for key in EARLIER.keys() - {"transformers_version"}} == {
        key: value for key, value in EARLIER.items() if key != "transformers_version"
    }


# Written by 0.1.0 before its modules of models were divided; values that are the default left out.
EARLIER: dict[str, Any] = {
    "architectures": ["GLAForCausalLM"],
    "gla_key_width": 16,
    "head_dim": 32,
    "hidden_size": 32,
    "intermediate_size": 96,
    "layer_types": ["gla", "mamba", "sliding_attention"],
    "mamba_dt_rank": 2,
    "mamba_inner_size": 64,
    "mamba_state_size": 16,
    "model_type": "rnnzoo-gla",
    "num_attention_heads": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "sliding_window": 4,
    "ssm_conv_kernel": 3,
    "ssm_expand": 2,
    "transformers_version": "5.24.0",
    "vocab_size": 61,
}
