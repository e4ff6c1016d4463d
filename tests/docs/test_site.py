"""The site builds strictly from the sources as they are, and its pictures show the numbers of its tables."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rnnzoo.cli import COMMANDS
from rnnzoo.conversions.recipes import list_recipes
from rnnzoo.zoo.core.registry import architectures

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "docs" / "assets"
THEMES = ("light", "dark")


def written(folder: Path) -> dict[str, str]:
    import make_docs

    make_docs.write(folder)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.md")}


def test_generated_pages_name_everything(tmp_path):
    pages = written(tmp_path)
    assert {f"zoo/{name}.md" for name in architectures()} <= set(pages)
    assert not [name for name, text in pages.items() if re.search(r"^<!-- (generated|include)", text, re.MULTILINE)]
    for command in COMMANDS:
        assert f"\n## rnnzoo {command}\n" in pages["commands.md"]
    assert "`--state-budget SIZE`" in pages["commands.md"]
    for recipe in list_recipes():
        assert f"\n### {recipe}\n" in pages["recipes.md"]
    assert "### gated_linear_attention\n" in pages["kernels.md"] and "`chunked`" in pages["kernels.md"]


@pytest.mark.slow
def test_site_builds_strictly(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python"):
        if importlib.util.find_spec(package.partition(".")[0]) is None or importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra docs)")
    command = [sys.executable, str(ROOT / "scripts" / "make_docs.py"), "--out", str(tmp_path / "site")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    for page in (
        "index.html",
        "zoo/index.html",
        "api/index.html",
        *(f"zoo/{name}/index.html" for name in architectures()),
    ):
        assert (site / page).is_file()
    api = (site / "api" / "index.html").read_text()
    assert "rnnzoo.kernels.delta_rule" in api and "import_checkpoint" in api
    # A reader's browser asks nobody else for anything.
    for page in site.rglob("*.html"):
        assert not re.findall(
            r"<(?:script|img|source)[^>]*src=\"?https?:|<link[^>]*stylesheet[^>]*https?:", page.read_text()
        )


@pytest.mark.parametrize("theme", THEMES)
def test_plot_of_the_readme_shows_the_numbers_of_the_results_page(theme):
    from make_pictures import PAGE
    from site_pictures import results

    measured = results.numbers(PAGE)
    assert (
        measured["speed"]["student"].keys() == measured["speed"]["teacher"].keys() and len(measured["perplexity"]) == 2
    )
    found = next(
        iter(ElementTree.parse(ASSETS / f"result-{theme}.svg").iter("{http://purl.org/dc/elements/1.1/}description"))
    )
    assert json.loads(found.text) == json.loads(json.dumps(measured)), "run scripts/make_pictures.py"


def test_numbers_of_the_readme_are_those_of_the_results_page():
    """Rows that both tables have, and the sentence about speed and memory."""
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text()
    rows = re.findall(r"^\| (`rnnzoo[^|]*) \|(.*)\|$", readme.partition("## Measured")[2], re.MULTILINE)
    assert len(rows) == 3
    for name, cells in rows:
        theirs = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", page, re.MULTILINE)
        assert theirs, name
        own = [cell.strip(" *") for cell in cells.split("|")]
        measured = [cell.strip(" *") for cell in theirs[1].split("|")]
        assert own[:3] == measured[:3] and own[4:6] == measured[4:6]
        assert [own[3], own[6]] == re.findall(r"student / teacher \(([\d.]+)\)", page)


def test_pictures_are_small_and_come_in_both_themes(tmp_path):
    pytest.importorskip("matplotlib")
    from make_pictures import CONCEPTS

    from rnnzoo.cards.style import DARK, LIGHT

    for name in (*CONCEPTS, "result"):
        light, dark = ((ASSETS / f"{name}-{theme}.svg").read_text() for theme in THEMES)
        assert max(len(light), len(dark)) < 100_000 and light != dark
        assert LIGHT.ink in light and DARK.ink in dark and LIGHT.ink not in dark
        assert f"{name}-light.svg" in "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for draw in CONCEPTS.values():
        assert draw(LIGHT).get_axes()
