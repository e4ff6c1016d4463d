"""The YAML block at the head of a card, read as the Hub reads it."""

from __future__ import annotations

from huggingface_hub import ModelCard

from rnnzoo.cards.licences import hub_licence
from rnnzoo.cards.render import render_text

from .invented import head, invented


def test_the_metadata_is_what_the_hub_reads():
    text = render_text(invented())
    data = head(text)
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers"
    assert data["base_model"] == "someone/Invented-135M" and data["base_model_relation"] == "finetune"
    assert "hybrid" in data["tags"] and "constant-memory" not in data["tags"]
    card = ModelCard(text)
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    text_set = "invented/test"
    assert found == {(text_set, "perplexity"): 12.5, (text_set, "bits_per_byte"): 1.25, ("pairs", "accuracy"): 0.74}
    errors = {r.metric_type: (r.metric_args or {}).get("stderr") for r in card.data.eval_results}
    assert errors == {"perplexity": 0.4, "bits_per_byte": None, "accuracy": 0.02}


def test_an_unknown_licence_is_other_with_its_name():
    assert hub_licence("Some Licence 2") == {"license": "other", "license_name": "some-licence-2"}
    assert hub_licence(None) == {"license": "unknown"}
    assert hub_licence("MIT") == {"license": "mit"}


def test_an_unknown_licence_is_linked_to_where_its_text_is():
    results = invented()
    results["teacher"]["licence"] = "Own Terms"
    data = head(render_text(results))
    assert data["license_name"] == "own-terms" and data["license_link"].endswith("/someone/Invented-135M")


def test_windows_of_one_text_are_metrics_of_one_data_set():
    results = invented()
    rows = results["evaluation"]["perplexity"]
    rows += [row | {"window": 8192, "value": 11.0} for row in rows]
    (index,) = head(render_text(results))["model-index"]
    assert [entry["dataset"]["name"] for entry in index["results"]] == ["invented/test", "pairs"]
    assert [m["args"]["window"] for m in index["results"][0]["metrics"]] == [2048, 2048, 8192, 8192]
