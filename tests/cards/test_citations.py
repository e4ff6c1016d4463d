"""What to cite: the papers that the architectures name themselves, the recipe's, the teacher's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rnnzoo.cards.citations import bibtex, citations, known_citations
from rnnzoo.cards.render import render_text

from .invented import invented, section

ZOO = Path(__file__).resolve().parents[2] / "zoo"
KNOWN = known_citations()


@pytest.mark.parametrize("architecture", KNOWN["architectures"])
def test_the_papers_of_an_architecture_are_those_of_its_source(architecture):
    """First author and year of every entry stand in the docstring of the model, written by other hands."""
    source = (ZOO / architecture / f"modeling_{architecture}.py").read_text()
    said = ast.get_docstring(ast.parse(source)) or ""
    for key in KNOWN["architectures"][architecture]:
        entry = KNOWN["entries"][key]
        surname = entry["author"].strip("{}").split(",")[0].split(" and ")[0].strip("}")
        assert surname in said and str(entry["year"]) in said, (architecture, key)


def test_every_architecture_of_the_zoo_has_a_citation():
    folders = {path.parent.name for path in ZOO.glob("*/modeling_*.py")} - {"core"}
    assert set(KNOWN["architectures"]) <= folders
    assert len(folders - set(KNOWN["architectures"])) <= len(folders) // 4


def test_every_key_has_an_entry_and_every_entry_is_used():
    used = {key for part in ("architectures", "recipes", "teachers") for keys in KNOWN[part].values() for key in keys}
    assert used == set(KNOWN["entries"])
    for key, entry in KNOWN["entries"].items():
        assert re.fullmatch(r"\d{4}\.\d{5}", entry["arxiv"]), key
        assert entry["year"] - int("20" + entry["arxiv"][:2]) in (0, 1), key  # printed a year later
        text = bibtex(key)
        assert text.count("{") == text.count("}") and text.startswith(f"@misc{{{key},")


def test_toolkit_method_recipe_and_teacher_are_cited_once_each():
    results = invented()
    results["recipe"]["name"] = "supra"
    results["model"] |= {"architecture": "supra", "layer_types": ["supra", "mamba2", "full_attention"]}
    found = citations(results, "someone/Invented-135M", "supra")
    keys = [re.match(r"@\w+\{([^,]+),", entry)[1] for entry in found]
    assert keys == ["rnnzoo", "mercat2024supra", "dao2024mamba2", "invented-135m"]
    assert "abc123" in found[-1] and "huggingface.co/someone/Invented-135M" in found[-1]


def test_a_teacher_is_cited_as_its_own_card_asks():
    results = invented()
    results["teacher"]["citation"] = "@article{theirs,\n  title = {Theirs},\n}"
    text = section(render_text(results), "Citation")
    assert "@article{theirs," in text and "invented-135m" not in text and "as its own card asks" not in text


def test_known_teachers_are_cited_with_their_paper():
    found = citations(invented(), "HuggingFaceTB/SmolLM2-135M-Instruct", "hedgehog")
    assert "2502.02737" in found[-1]
    assert "2502.02737" not in citations(invented(), "HuggingFaceTB/SmolLM2000", "hedgehog")[-1]
