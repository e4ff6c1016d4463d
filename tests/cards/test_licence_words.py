"""The chain of licences in plain words."""

from __future__ import annotations

import pytest

from rnnzoo.cards.render import render_text

from .invented import head, invented, section


def licence(results) -> str:
    return section(render_text(results), "Licence")


def test_the_teachers_licence_and_revision_are_the_chain():
    text = licence(invented())
    assert "Apache-2.0; it applies to this model too" in text
    assert "| teacher | someone/Invented-135M at main (abc123) | Apache-2.0 | derived works allowed" in text


def test_what_the_teacher_was_made_from_is_part_of_the_chain():
    results = invented()
    results["teacher"]["derived_from"] = ["first/Base"]
    assert "| the teacher was made from | first/Base | not known | see its card |" in licence(results)


@pytest.mark.parametrize("stated", ["cc-by-nd-4.0", "CC BY-NC-ND 3.0"])
def test_a_licence_that_forbids_derivatives_is_said_in_plain_words(stated):
    results = invented()
    results["teacher"]["licence"] = stated
    text = licence(results)
    assert "forbids publishing what is derived from it" in text and "not be shared" in text
    results["publish"] = {"permission": True}
    text = licence(results)
    assert "its owner gave them permission" in text and "does not pass on to you" in text


def test_an_unknown_licence_asks_the_reader_to_find_out():
    results = invented()
    results["teacher"]["licence"] = None
    assert "find it out before you share" in licence(results) and head(render_text(results))["license"] == "unknown"


def test_a_trained_model_has_the_licence_that_its_publisher_says():
    results = invented()
    del results["conversion"], results["recipe"]
    results["training"] = {}
    assert "yours to choose" in licence(results)
    results["publish"] = {"licence": "mit"}
    assert "under mit" in licence(results) and head(render_text(results))["license"] == "mit"
