"""The offline validator finds what the Hub, or a reader, would stumble over."""

from __future__ import annotations

import pytest
import yaml

from rnnzoo.cards import validate_card
from rnnzoo.cards.render import render_text

from .invented import invented


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("---\nlanguage", "language", "does not start"),
        ("license: apache-2.0", "licence: apache-2.0", "not licence"),
        ("license: apache-2.0", "license: apache", "knows no license"),
        ("license: apache-2.0", "license: other", "license_name"),
        ("library_name: transformers\n", "", "library_name"),
        ("library_name: transformers\n", "library_name: a b\n", "one word"),
        ("language:\n- en", "language:\n- English", "not a code"),
        ("base_model: someone/Invented-135M", "base_model: ./folder/model/x", "not a Hub id"),
        ("base_model: someone/Invented-135M", "datasets:\n- a/b/c", "not a Hub id"),
        ("base_model: someone/Invented-135M", "co2_eq_emissions: much", "number of grams"),
        ("base_model_relation: finetune", "base_model_relation: conversion", "none of"),
        ("type: perplexity\n", "typ: perplexity\n", "no metric"),
        ("## Limits", "## Limit", "'Limits' is missing"),
        ("12.50 ± 0.40", "None", "holds None"),
        ("12.50 ± 0.40", " ", "cell is empty"),
        ("12.50 ± 0.40", "12.50 | 0.40", "different numbers of cells"),
        ("## Limits", "{{ x }}\n\n## Limits", "template marks"),
        ("## Limits", "see /" + "home/me/x\n\n## Limits", "path of one machine"),
        ("## Limits", "[this](missing.png)\n\n## Limits", "leads nowhere"),
    ],
)
def test_the_validator_finds_faults(tmp_path, old, new, message):
    text = render_text(invented())
    assert old in text
    problems = validate_card(text.replace(old, new, 1), tmp_path)
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("index", [[], {}, "x", [{}], [{"name": "a", "results": []}], [{"name": "a", "results": [5]}]])
def test_results_that_the_hub_cannot_read_are_found(index):
    text = render_text(invented())
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(head) | {"model-index": index}
    assert any("model-index" in problem for problem in validate_card(f"---\n{yaml.safe_dump(data)}---\n{body}"))
