"""Pictures: drawn from the numbers on the card, readable on white and on black pages."""

from __future__ import annotations

import importlib.util

import pytest

from rnnzoo.cards import plots, render_card
from rnnzoo.cards.plots import PLOTS, drawn_from, write_plots
from rnnzoo.cards.style import BACKGROUNDS, COLOURS, GREY, MIXERS
from rnnzoo.kernels.errors import RnnzooError

from .invented import invented, write


def luminance(colour: tuple[float, ...]) -> float:
    """WCAG 2: of red, green, blue in 0..1."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    values = sorted(luminance(tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5))) for c in (one, other))
    return (values[1] + 0.05) / (values[0] + 0.05)


@pytest.mark.parametrize("page", BACKGROUNDS)
def test_every_colour_stands_out_on_both_pages(page):
    assert contrast(GREY, page) > 4.3  # words
    assert all(contrast(colour, page) > 3 for colour in (*COLOURS.values(), *MIXERS))  # WCAG 1.4.11


def test_all_pictures_are_drawn_with_a_background_that_lets_the_page_through(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    assert write_plots(invented(), tmp_path) == tuple(PLOTS)
    for name in PLOTS:
        picture = image.imread(tmp_path / name)
        assert picture.shape[2] == 4 and picture[0, 0, 3] == 0, name
        assert 0.02 < (picture[..., 3] > 0.5).mean() < 0.9, name  # something is drawn, and not everywhere


def test_the_same_numbers_are_not_drawn_again_and_others_are(tmp_path):
    pytest.importorskip("matplotlib")
    results = invented()
    write_plots(results, tmp_path)
    files = {name: (tmp_path / name).stat().st_mtime_ns for name in PLOTS}
    write_plots(results, tmp_path)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in PLOTS} == files
    results["evaluation"]["recall"][0]["accuracy"] = 0.5
    write_plots(results, tmp_path)
    assert [name for name in PLOTS if (tmp_path / name).stat().st_mtime_ns != files[name]] == [
        "plots/recall_by_distance.png"
    ]


def test_the_layer_map_takes_hybrids_and_layers_without_windows(tmp_path):
    pytest.importorskip("matplotlib")
    results = {"model": {"layer_types": ["mamba2"] * 40 + ["full_attention"] * 8, "layer_state_bytes": [10_000] * 48}}
    assert write_plots(results, tmp_path) == ("plots/layers.png",)


def test_without_matplotlib_there_are_no_plots_but_a_line(tmp_path, monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    plots._say_no_plots.cache_clear()
    assert write_plots(invented(), tmp_path) == () and "pip install" in caplog.text
    assert "](plots/" not in render_card(write(tmp_path, invented(), pictures=False)).read_text()
    assert caplog.text.count("pip install") == 1


def test_pictures_of_other_numbers_are_not_shown(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    results = invented()
    assert render_card(write(tmp_path, results, pictures=False)).read_text().count("](plots/") == len(PLOTS)
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    results["evaluation"]["recall"][0]["accuracy"] = 0.5
    text = render_card(write(tmp_path, results)).read_text()
    assert [name for name in PLOTS if f"({name})" not in text] == ["plots/recall_by_distance.png"]


def test_a_file_that_is_no_picture_of_ours_has_no_numbers(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "b.png").write_bytes(b"png")
    assert [drawn_from(tmp_path / name) for name in ("a.png", "b.png", "c.png")] == [None] * 3


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "plots").write_text("a file in the way")
    with pytest.raises(RnnzooError, match="Cannot write"):
        write_plots(invented(), tmp_path)
