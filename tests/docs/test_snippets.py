"""Every snippet of the README and of the documentation runs, in the order of its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from .snippets import Snippet, run, snippets

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}


def of_page(page: str) -> list[Snippet]:
    return snippets(PAGES[page].read_text(), page)


WITH_SNIPPETS = [page for page in PAGES if any(not snippet.not_run for snippet in of_page(page))]


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_snippets_of_a_page_run(page, folder):
    namespace = {"__name__": "snippet"}
    for snippet in of_page(page):
        if not snippet.not_run and not snippet.slow:
            run(snippet, namespace)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(snippet.slow for snippet in of_page(page))])
def test_slow_snippets_run_in_their_places(page, folder):
    namespace = {"__name__": "snippet"}
    for snippet in of_page(page):
        if not snippet.not_run:
            run(snippet, namespace)


def test_few_snippets_are_not_run_and_each_says_why():
    left_out = [snippet for page in PAGES for snippet in of_page(page) if snippet.not_run]
    assert all(len(snippet.not_run.split()) > 1 for snippet in left_out)
    run_or_slow = [snippet for page in PAGES for snippet in of_page(page) if not snippet.not_run]
    assert len(left_out) <= 10 and len(run_or_slow) > 3 * len(left_out)


def test_a_broken_snippet_fails(folder):
    for text in ("```python\nassert 1 == 2\n```\n", "```bash\nrnnzoo card nowhere\n```\n", "```bash\nfalse\n```\n"):
        (snippet,) = snippets(text, "page.md")
        with pytest.raises(AssertionError):
            run(snippet, {})


def test_unknown_languages_and_marks_are_refused():
    with pytest.raises(ValueError, match="page.md:3: a block of 'rust'"):
        snippets("one\n\n```rust\n```\n", "page.md")
    with pytest.raises(ValueError, match="'sometimes' is no mark"):
        snippets("<!-- snippet: sometimes -->\n```python\n```\n", "page.md")
    marked = "<!-- snippet: slow; replace 20M 2k; options --a 'b c' -->\n```bash\nrnnzoo list\n```\n"
    (snippet,) = snippets(marked, "page.md")
    assert snippet.slow and snippet.replaced == {"20M": "2k"} and snippet.options == ("--a", "b c")
    assert snippet.where == "page.md:2"
