"""The card: complete, honest about what was not measured, the same for the same numbers."""

from __future__ import annotations

import copy
import json

import pytest

from rnnzoo.cards import render_card, validate_card
from rnnzoo.cards.render import render_text
from rnnzoo.cards.validate import SECTIONS
from rnnzoo.kernels.errors import RnnzooError

from .invented import head, invented, section, write


def test_a_full_card_is_valid_and_has_its_numbers(tmp_path):
    text = render_card(write(tmp_path, invented())).read_text()
    assert validate_card(text, tmp_path) == []
    for words in (
        "12.50 ± 0.40", "10.00 ± 0.40", "20.25 ± 0.40", "1.250", "61,410 tokens", "window 61 + 4 sinks", "1.50 MB",
        "| 0 to 1 | hedgehog | 64, 8 |", "An invented sample.", "What \\| is this?", "20 min 34 s",
        "cd" * 32, "ab" * 32, "30.00 ± 2.00", "the teacher has 10.50 ± 0.70 on them", "4.50e-03", "1.23e-02", "96.9 %",
    ):  # fmt: skip
        assert words in text, words


def test_the_example_stands_with_what_it_printed():
    text = section(render_text(invented()), "Use")
    assert "```python\nprint('An invented')\nprint('answer.')\n```" in text
    assert "```text\nAn invented\nanswer.\n```" in text
    results = invented()
    del results["snippet"]
    text = section(render_text(results), "Use")
    assert "from_pretrained(folder)" in text and "What it prints: not measured." in text


def test_state_bytes_of_long_contexts_are_calculated_where_the_measured_ones_lie_on_a_line():
    text = section(render_text(invented()), "Memory")
    assert "| 128k (calculated) | 1.50 MB | 3.02 GB | 149 bytes |" in text
    assert "| 32k | 1.50 MB |" in text and "32k (calculated)" not in text
    results = invented()
    results["evaluation"]["decode"][1]["state_bytes"] += 5
    assert "| 128k (calculated) | 1.50 MB | not measured | 149 bytes |" in section(render_text(results), "Memory")


def test_a_folder_with_modelling_code_says_that_it_loads_without_rnnzoo(tmp_path):
    write(tmp_path, invented())
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "x"}))
    assert "trust_remote_code" not in render_card(tmp_path).read_text()
    config.write_text(json.dumps({"model_type": "x", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}))
    assert "trust_remote_code=True" in render_card(tmp_path).read_text()


def test_what_was_not_measured_says_so(tmp_path):
    results = invented()
    del results["evaluation"]["decode"], results["evaluation"]["parity"]
    results["evaluation"]["tasks"] = [r for r in results["evaluation"]["tasks"] if r["column"] == "student"]
    text = render_card(write(tmp_path, results)).read_text()
    assert "| accuracy, pairs | 300 | 0.740 ± 0.020 | not measured | not measured | not measured |" in text
    assert section(text, "Decoding speed").count("Not measured.") == 1
    assert section(text, "Energy").strip() == "Energy and CO2: not measured."
    assert "Not measured: decoding speed and state bytes, reading at once against token by token, other" in text


def test_a_conversion_with_nothing_in_it_still_gives_a_valid_card(tmp_path):
    text = render_card(write(tmp_path, {"schema": 1, "conversion": {}})).read_text()
    assert validate_card(text, tmp_path) == []
    assert text.lower().count("not measured") > 15
    assert head(text)["license"] == "unknown" and "base_model" not in head(text)


def test_energy_is_on_the_card_and_in_the_metadata_when_it_was_measured():
    results = invented()
    results["conversion"]["energy"] = {
        "energy_kwh": 0.0125, "emissions_kg": 0.00475, "seconds": 1200.0, "country": "DEU", "source": "CodeCarbon 3.3",
    }  # fmt: skip
    text = render_text(results)
    assert "| energy | 0.0125 kWh |" in text and "| CO2 equivalents | 4.75 g |" in text and validate_card(text) == []
    assert head(text)["co2_eq_emissions"] == {
        "emissions": 4.75, "source": "CodeCarbon 3.3", "training_type": "fine-tuning",
        "geographical_location": "DEU", "hardware_used": "An invented CPU, 2 threads",
    }  # fmt: skip
    assert "co2_eq_emissions" not in head(render_text(invented()))


def test_rendering_twice_gives_the_same_file(tmp_path):
    write(tmp_path, invented())
    first = {path: path.read_bytes() for path in [render_card(tmp_path), *(tmp_path / "plots").glob("*")]}
    render_card(tmp_path)
    assert {path: path.read_bytes() for path in first} == first
    assert {path.name for path in tmp_path.iterdir()} <= {"README.md", "results.json", "plots"}


def test_a_local_teacher_leaks_no_path():
    results = invented()
    results["teacher"] |= {"name": "/srv/somebody/models/secret-135m", "kind": "folder"}
    text = render_text(results)
    assert "/srv" not in text and "secret-135m" in text
    assert "base_model" not in head(text) and validate_card(text) == []


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


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_section_is_there_in_order(kind):
    results = invented()
    if kind != "converted":
        del results["conversion"], results["recipe"]
    if kind in ("trained", "adapter"):
        results["training" if kind == "trained" else kind] = {}
    text = render_text(results)
    places = [text.index(f"\n## {name}\n") for name in SECTIONS[kind]]
    assert places == sorted(places) and f"(kind: {kind})" in text and validate_card(text) == []


def test_results_are_not_changed_by_rendering():
    results = invented()
    before = copy.deepcopy(results)
    render_text(results)
    assert results == before


def test_the_command_to_reproduce_names_the_commit_of_a_hub_teacher():
    results = invented()
    results["teacher"]["kind"] = "hub"
    assert "rnnzoo convert someone/Invented-135M --recipe rnnzoo" in render_text(results)
    assert "--revision abc123" in section(render_text(results), "Reproduce")


def test_collections_and_data_sets_are_linked():
    results = invented()
    results["publish"] = {"collections": ["someone/recurrent-1a2b"], "datasets": ["someone/prose"], "language": ["de"]}
    results["conversion"]["data"]["training"]["source"] = "notes.txt, other/streamed:big"
    text = render_text(results)
    assert "(https://huggingface.co/collections/someone/recurrent-1a2b)" in text
    assert head(text)["datasets"] == ["other/streamed", "someone/prose"] and head(text)["language"] == ["de"]
    assert "(https://huggingface.co/datasets/other/streamed)" in text and validate_card(text) == []
