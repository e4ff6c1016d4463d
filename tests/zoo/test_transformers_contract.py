"""What transformers asks of every model's class: plans of what is there, generation, and steps that never wait."""

from __future__ import annotations

import re

import pytest
import torch
from transformers.generation import GenerationMixin

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.cache import CACHE_NAME
from rnnzoo.zoo.core.documents import Progress
from rnnzoo.zoo.core.folders import architecture_module
from rnnzoo.zoo.core.registry import architectures, config_class
from rnnzoo.zoo.core.rotary import Rotary
from rnnzoo.zoo.core.sizes import causal_lm_class

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
# Once a step it compares the few parameters that its matrices were solved from.
WAIT = {"lssl"}


@pytest.mark.parametrize("name", architectures())
def test_the_plan_for_tensor_parallelism_names_what_the_model_has(name):
    causal = causal_lm_class(name)
    for suffix in ("Model", "ForCausalLM", "ForSequenceClassification"):
        cls = getattr(architecture_module(name, "modeling"), causal.__name__.removesuffix("ForCausalLM") + suffix)
        for options in ({}, {"intermediate_size": 0}, {"intermediate_size": 64, "mlp_type": "plain"}):
            config = config_class(name)(**SIZES | options)
            with torch.device("meta"):
                model = cls(config)
            modules = {re.sub(r"\d+", "*", found) for found, _ in model.named_modules()}
            assert model.tp_plan and set(model.tp_plan) <= modules
            assert any(".mlp.up_proj" in found for found in model.tp_plan) == any(".mlp.up_proj" in x for x in modules)
            assert ("lm_head" in model.tp_plan) == (suffix == "ForCausalLM")


@pytest.mark.parametrize("name", architectures())
def test_the_class_that_generates_says_so_itself(name):
    cls = causal_lm_class(name)
    assert GenerationMixin in cls.__bases__ and cls.can_generate()
    assert not cls.__mro__[1].__mro__[1].can_generate()  # nor do models without a head


@pytest.mark.parametrize("name", sorted(set(architectures()) - WAIT))
def test_a_step_of_decoding_never_reads_a_value_from_the_device(name, monkeypatch):
    """On the meta device there are no values to read."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # it does not know this device
    model = causal_lm_class(name)(config_class(name)(**SIZES)).eval()
    ids = torch.zeros(2, 5, dtype=torch.long)
    with torch.no_grad():
        cache = getattr(model(ids, use_cache=True), CACHE_NAME)
        cache.states = [state.map(lambda tensor: tensor.to("meta")) for state in cache.states]
        cache.progress = Progress(cache.progress.seen.to("meta"))
        model.to("meta")
        for _ in range(2):
            assert model(ids[:, :1].to("meta"), **{CACHE_NAME: cache}).logits.shape == (2, 1, 61)


def test_generate_looks_at_no_mask_after_the_prompt(monkeypatch):
    model = causal_lm_class("gla")(config_class("gla")(**SIZES)).eval()
    masks, forward = [], type(model).forward

    def seen(self, *args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(model), "forward", seen)
    ids, mask = torch.arange(3, 13).view(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert masks[0] is not None and masks[1:] == [None] * 3
    alone = model.generate(ids[:1, 2:], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(padded[:1, 5:], alone[:, 3:])


SCALED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize("name", [*architectures(), "gated_delta_net.attention", "kda.attention", "rotated rwkv6"])
def test_scaled_rotation_is_refused_where_no_layer_rotates(name, monkeypatch):
    turned, rotate = [], Rotary.rotate
    monkeypatch.setattr(Rotary, "rotate", lambda self, *given: turned.append(1) or rotate(self, *given))
    options = SIZES | ({"rwkv_rotate": True} if "rotated" in name else {})
    name = name.removeprefix("rotated ")
    cls, model = config_class(name), causal_lm_class(name.partition(".")[0])
    config = cls(**options, layer_types=[name] * 3)
    model(config)(torch.arange(3, 9)[None])
    config.rope_parameters = SCALED
    if turned:
        model(config)
        return
    with pytest.raises(RnnzooError, match="rope_type='linear', but no layer of this model rotates"):
        model(config)
    config.architectures = [model.__name__]  # as files of earlier versions and students of a scaled teacher have it
    model(config)
    model(cls.from_dict(config.to_dict()))
