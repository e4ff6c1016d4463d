"""The card: valid, complete, honest about what was not measured, the same for the same numbers."""

from __future__ import annotations

import copy
import json

import pytest
import yaml

from rnnzoo.cards import render_card, validate_card
from rnnzoo.cards.licences import hub_licence
from rnnzoo.cards.render import PLOTS, render_text
from rnnzoo.cards.validate import SECTIONS
from rnnzoo.kernels.errors import RnnzooError

COLUMNS = ("student", "teacher", "window")


def invented() -> dict:
    """Numbers that nobody measured, for the shape of the card only."""
    values = dict(zip(COLUMNS, (12.5, 10.0, 20.25), strict=True))
    evaluation = {
        "columns": list(COLUMNS),
        "window_baseline": {"window": 61, "sinks": 4, "state_bytes": 1_500_000, "context": 2048},
        "datasets": [{"name": "invented/test", "kind": "text", "size": "1 documents, 9 bytes", "sha256": "ab" * 32}],
        "perplexity": [
            {
                "dataset": "invented/test", "window": 2048, "stride": None, "column": column, "value": value,
                "stderr": 0.4, "bits_per_byte": value / 10, "n_tokens": 61_410, "n_windows": 30,
            }
            for column, value in values.items()
        ],
        "tasks": [
            {"task": "pairs", "column": column, "metric": "accuracy", "value": value, "stderr": 0.02, "n": 300}
            for column, value in zip(COLUMNS, (0.74, 0.8, 0.7), strict=True)
        ],
        "recall": [
            {"distance": d, "column": c, "accuracy": a, "stderr": 0.1, "n": 16, "chance": 0.1}
            for d, accuracies in ((64, (1.0, 1.0, 1.0)), (1024, (0.6, 0.9, 0.1)), (8192, (0.1, 0.1, 0.1)))
            for c, a in zip(COLUMNS, accuracies, strict=True)
        ],
        "decode": [
            {
                "context": n, "column": c, "tokens_per_second": speed, "state_bytes": size, "device": "An invented CPU",
                "dtype": "bfloat16",
            }
            for n in (1024, 32_768)
            for c, speed, size in (("student", 9, 1_500_000), ("teacher", 9e3 / n, 23_040 * n), ("window", 9, 149))
        ],
        "by_position": [
            {"start": a, "end": b, "column": c, "perplexity": values[c] + i, "n_tokens": b - a, "dataset": "A book"}
            for i, (a, b) in enumerate(((0, 2048), (2048, 4096), (4096, 8192)))
            for c in COLUMNS
            if (c, a) != ("teacher", 4096)
        ],
    }  # fmt: skip
    return {
        "schema": 1,
        "created": "2001-02-03T04:05:06+00:00",
        "rnnzoo_version": "0.1.0",
        "model": {
            "name": "invented-135m",
            "architecture": "HedgehogForCausalLM",
            "model_type": "rnnzoo-hedgehog",
            "parameters": 134_515_008,
            "dtype": "bfloat16",
            "layer_types": ["hedgehog", "hedgehog", "full_attention", "hedgehog"],
            "windows": [[64, 8], [64, 8], [], [128, 16]],
            "state_bytes": 1_500_000,
        },
        "teacher": {
            "name": "someone/Invented-135M", "sha": "abc123", "licence": "Apache-2.0", "parameters": 134_515_008,
            "revision": "main",
        },
        "recipe": {"name": "rnnzoo", "sha256": "cd" * 32, "yaml": "name: rnnzoo\nstages:\n- align\n"},
        "conversion": {
            "tokens": 500_000,
            "seconds": 1234.5,
            "hardware": "An invented CPU, 2 threads",
            "stages": [
                {"name": "align", "tokens": 200_000, "seconds": 5, "loss_first": 1, "loss_last": 0.1, "perplexity": 3},
                {"name": "distill", "tokens": 300_000, "seconds": 734.5, "loss_first": 0.4, "loss_last": 0.2},
            ],
            "data": {"training": {"source": "prose", "tokens": 500_000, "sha256": "ef" * 32}},
        },
        "evaluation": evaluation,
        "samples": [{"prompt": "What | is this?", "output": "An invented\nanswer."}],
        "environment": {"python": "3.11", "torch": "2.13.0"},
    }  # fmt: skip


def write(folder, results):
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_full_card_is_valid_and_has_its_numbers(tmp_path):
    card = render_card(write(tmp_path, invented()))
    text = card.read_text()
    assert validate_card(text, tmp_path) == []
    for words in (
        "12.50 ± 0.40", "10.00 ± 0.40", "20.25 ± 0.40", "1.250", "61,410 tokens", "window 61 + 4 sinks", "1.50 MB",
        "| 0 to 1 | hedgehog | 64, 8 |", "An invented answer.", "What \\| is this?", "20 min 34 s",
        "cd" * 32, "ab" * 32,
    ):  # fmt: skip
        assert words in text, words


def test_what_was_not_measured_says_so(tmp_path):
    results = invented()
    del results["evaluation"]["decode"]
    results["evaluation"]["tasks"] = [r for r in results["evaluation"]["tasks"] if r["column"] == "student"]
    text = render_card(write(tmp_path, results)).read_text()
    assert "| accuracy, pairs | 300 | 0.740 ± 0.020 | not measured | not measured | not measured |" in text
    assert text.split("## Decoding speed")[1].split("##")[0].count("Not measured.") == 1
    assert "Not measured: decoding speed and state bytes, other languages" in text


def test_results_with_nothing_in_them_still_give_a_valid_card(tmp_path):
    text = render_card(write(tmp_path, {"schema": 1})).read_text()
    assert validate_card(text, tmp_path) == []
    assert text.lower().count("not measured") > 15
    assert head(text)["license"] == "unknown" and "base_model" not in head(text)


def test_rendering_twice_gives_the_same_file(tmp_path):
    write(tmp_path, invented())
    first = render_card(tmp_path).read_bytes()
    assert render_card(tmp_path).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "results.json"]


def test_the_metadata_is_what_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard

    text = render_text(invented())
    data = head(text)
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers"
    assert data["base_model"] == "someone/Invented-135M" and data["base_model_relation"] == "finetune"
    assert "hybrid" in data["tags"] and "constant-memory" not in data["tags"]
    card = ModelCard(text)
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    text_set = "invented/test"
    assert found == {(text_set, "perplexity"): 12.5, (text_set, "bits_per_byte"): 1.25, ("pairs", "accuracy"): 0.74}


def test_limits_follow_from_the_numbers():
    text = render_text(invented()).split("## Limits")[1].split("##")[0]
    assert "1.25 times that of its teacher" in text
    assert "better than the teacher cut to a window" in text and "not better" not in text
    assert "from 64 and 1,024 tokens back" in text and "From 8,192 tokens back" in text
    assert "1.50 MB at any length" in text and "6.0 points on pairs" in text
    worse = invented()
    worse["evaluation"]["perplexity"][2]["value"] = 11.0
    assert "not better than the teacher cut" in render_text(worse)


def test_a_local_teacher_leaks_no_path():
    results = invented()
    results["teacher"] |= {"name": "/srv/somebody/models/secret-135m", "kind": "folder"}
    text = render_text(results)
    assert "/home" not in text and "secret-135m" in text
    assert "base_model" not in head(text) and validate_card(text) == []


def test_an_unknown_licence_is_other_with_its_name():
    assert hub_licence("Some Licence 2") == {"license": "other", "license_name": "some-licence-2"}
    assert hub_licence(None) == {"license": "unknown"}
    assert hub_licence("MIT") == {"license": "mit"}


def test_only_plots_that_exist_are_shown(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "recall_by_distance.png").write_bytes(b"png")
    text = render_card(write(tmp_path, invented())).read_text()
    assert [name for name in PLOTS if f"({name})" in text] == ["plots/recall_by_distance.png"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("---\nlanguage", "language", "does not start"),
        ("license: apache-2.0", "licence: apache-2.0", "not licence"),
        ("license: apache-2.0", "license: apache", "knows no license"),
        ("license: apache-2.0", "license: other", "license_name"),
        ("library_name: transformers\n", "", "library_name"),
        ("base_model: someone/Invented-135M", "base_model: ./folder/model/x", "not a Hub id"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no results.json"), ("{", "not readable"), ('{"schema": 2}', "schema 1"), ("[]", "schema 1")],
)
def test_bad_results_give_one_sentence_and_no_card(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(RnnzooError, match=message):
        render_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_every_section_is_there_in_order():
    text = render_text(invented())
    places = [text.index(f"\n## {section}\n") for section in SECTIONS]
    assert places == sorted(places)


def test_results_are_not_changed_by_rendering():
    results = invented()
    before = copy.deepcopy(results)
    render_text(results)
    assert results == before
