"""Branches measured alone: what they are, that they are measured as such, and what the card says of them."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.cards.limits import limits
from rnnzoo.cards.view import View
from rnnzoo.conversions.evaluation import Dataset, Limits, ablations, evaluate
from rnnzoo.conversions.evaluation.ablations import ablation, branches, only
from rnnzoo.conversions.evaluation.perplexity import perplexity
from rnnzoo.zoo.core.heads import RecurrentForCausalLM
from rnnzoo.zoo.hedgehog.configuration_hedgehog import HedgehogConfig
from rnnzoo.zoo.hedgehog.modeling_hedgehog import HedgehogForCausalLM

from ..tiny import tiny_tokenizer

TEXT = "The king went to the hill and it was on the way of the sea. " * 40
SETTINGS = {"text": TEXT, "window": 64, "max_tokens": 200, "distances": (64,), "facts": 2, "chunk": 64}


def model_of(**changes) -> RecurrentForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, initializer_range=0.3)
    maps = dict(feature_map="prototype", feature_width=4, window_size=8, num_sinks=2)
    return HedgehogForCausalLM(HedgehogConfig(**(sizes | maps | changes))).eval()


def value(model) -> float:
    return perplexity(model, tiny_tokenizer(), TEXT, window=64, max_tokens=200).value


def test_branches_are_those_of_the_layers():
    assert branches(model_of()) == ("window", "linear")
    assert branches(model_of(layer_types=["full_attention", "full_attention"])) == ()


@pytest.mark.parametrize("branch", [None, "window", "linear"])
def test_each_branch_is_measured_alone(branch):
    model = model_of(layer_types=["hedgehog", "full_attention"])
    changes = {None: {}, "window": {"feature_width": 0}, "linear": {"window_size": 1, "num_sinks": 0}}[branch]
    alone = model_of(layer_types=["hedgehog", "full_attention"], **changes)
    own = {k: v for k, v in model.state_dict().items() if alone.state_dict()[k].shape == v.shape}
    alone.load_state_dict(own, strict=False)
    found = ablation(model, tiny_tokenizer(), branch, **SETTINGS)
    assert found["perplexity"] == pytest.approx(value(alone), rel=1e-4)
    assert set(found["recall"]) == {"64"} and 0 <= found["recall"]["64"] <= 1


def test_the_model_is_whole_again_even_after_an_error():
    model, before = model_of(), value(model_of())
    with pytest.raises(ZeroDivisionError), only(model, "linear"):
        assert value(model) != before
        raise ZeroDivisionError
    assert value(model) == before


def test_a_perplexity_that_no_float_holds_is_none(monkeypatch):
    def too_large(*args, **kwargs):
        raise OverflowError

    monkeypatch.setattr(ablations, "perplexity", too_large)
    assert ablation(model_of(), tiny_tokenizer(), "linear", **SETTINGS)["perplexity"] is None


def test_an_evaluation_has_the_whole_and_each_branch(tmp_path):
    model_of().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    sizes = Limits(
        windows=(64,),
        perplexity_tokens=200,
        distances=(64, 2048),
        recall_contexts=(),
        ablation_tokens=200,
        facts=2,
        streams=1,
        contexts=(),
        position_tokens=128,
        parity_steps=0,
        sample_tokens=0,
        chunk=64,
    )
    results = evaluate(tmp_path, datasets=[Dataset.of_texts("t", [TEXT])], limits=sizes, dtype=torch.float32)
    rows = results["evaluation"]["ablations"]
    assert [row["branch"] for row in rows] == ["whole", "window", "linear"]
    assert rows[0]["perplexity"] == pytest.approx(results["evaluation"]["perplexity"][0]["value"])
    assert all(set(row["recall"]) == {"64"} for row in rows)
    said = " ".join(limits(View(results)))
    assert "With its exact windows alone" in said and "With the linear state alone" in said
