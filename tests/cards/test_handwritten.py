"""What people write into a card stays; what is damaged is not overwritten."""

from __future__ import annotations

import pytest

from rnnzoo.cards import render_card, validate_card
from rnnzoo.cards.handwritten import BEGIN, END
from rnnzoo.kernels.errors import RnnzooError

from .invented import invented, section, write

OWN = "My *own* words: | a | b |\n\n\n\n{{ braces }} and 12 €\n  indented, no | table\n"


def test_hand_written_lines_survive_new_numbers_and_further_edits(tmp_path):
    results = invented()
    card = render_card(write(tmp_path, results))
    card.write_text(card.read_text().replace(BEGIN + "\n", BEGIN + "\n" + OWN))
    results["evaluation"]["perplexity"][0]["value"] = 11.75
    text = render_card(write(tmp_path, results)).read_text()
    assert "11.75 ± 0.40" in text and f"{BEGIN}\n{OWN}{END}\n" in text and validate_card(text, tmp_path) == []
    card.write_text(text.replace("12 €", "13 €"))
    again = render_card(tmp_path)
    assert again.read_text() == text.replace("12 €", "13 €")
    before = again.read_bytes()
    assert render_card(tmp_path).read_bytes() == before


def test_the_card_says_how_to_write_into_it(tmp_path):
    text = section(render_card(write(tmp_path, invented())).read_text(), "Notes")
    assert "stays as it is when the card is rendered again" in text and text.rstrip().endswith(f"{BEGIN}\n{END}")


def test_windows_line_ends_are_understood(tmp_path):
    card = render_card(write(tmp_path, invented()))
    edited = card.read_text().replace(BEGIN + "\n", BEGIN + "\nmine\n")
    card.write_bytes(edited.replace("\n", "\r\n").encode())
    assert render_card(tmp_path).read_text() == edited


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (END + "\n", ""),
        (BEGIN + "\n", ""),
        (BEGIN, "<!-- begin hand-written -->"),
        (END, BEGIN),
        (f"{BEGIN}\n{END}", f"{END}\n{BEGIN}"),
        (END, f"{END}\n{BEGIN}\nmore\n{END}"),
        (BEGIN, f"text before {BEGIN}"),
    ],
)
def test_damaged_marks_are_told_in_one_sentence_and_nothing_is_written(tmp_path, old, new):
    card = render_card(write(tmp_path, invented()))
    damaged = card.read_text().replace(old, new)
    card.write_text(damaged)
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(RnnzooError, match=r"marks of the hand-written section .* Nothing was written\.") as caught:
        render_card(tmp_path)
    assert "\n" not in str(caught.value) and card.read_text() == damaged and sorted(tmp_path.rglob("*")) == files


def test_somebody_elses_readme_is_not_overwritten_unless_asked(tmp_path):
    card = write(tmp_path, invented()) / "README.md"
    card.write_text("# Mine\n")
    with pytest.raises(RnnzooError, match="--replace"):
        render_card(tmp_path)
    assert card.read_text() == "# Mine\n"
    assert "12.50" in render_card(tmp_path, replace=True).read_text()


def test_what_people_write_is_theirs_and_not_checked(tmp_path):
    card = render_card(write(tmp_path, invented()))
    card.write_text(card.read_text().replace(BEGIN + "\n", BEGIN + "\n| None |\n## Limits again\n[x](nowhere.md)\n"))
    assert "nowhere.md" in render_card(tmp_path).read_text()
