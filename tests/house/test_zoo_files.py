"""An architecture is one small folder, and no copy of another."""

from __future__ import annotations

import ast
import difflib
import itertools
import pathlib
import re

import pytest

from rnnzoo.zoo.core.registry import architectures, config_class

ZOO = pathlib.Path(__file__).resolve().parents[2] / "zoo"


def docstrings(tree: ast.AST) -> list[ast.Expr]:
    bodies = [getattr(node, "body", None) for node in ast.walk(tree)]
    firsts = [body[0] for body in bodies if isinstance(body, list) and body]
    return [x for x in firsts if isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)]


def lines_of_code(path: pathlib.Path) -> int:
    """Lines that are neither blank, comment nor docstring."""
    text = path.read_text()
    skipped = {n for x in docstrings(ast.parse(text)) for n in range(x.lineno, x.end_lineno + 1)}
    lines = enumerate(text.splitlines(), 1)
    return sum(n not in skipped and bool(line.strip()) and not line.strip().startswith("#") for n, line in lines)


def normalised(name: str) -> list[str]:
    """The model file's code without docstrings and imports, its layout and the architecture's own name taken out."""
    tree = ast.parse((ZOO / name / f"modeling_{name}.py").read_text())
    for text in docstrings(tree):
        text.value = ast.Constant(...)
    prefix = config_class(name).__name__.removesuffix("Config")
    skipped = r"\.\.\.$|(from|import|__all__)\b"
    lines = [line for line in ast.unparse(tree).splitlines() if not re.match(skipped, line.strip() or "...")]
    return [line.replace(prefix, "X").replace(f"'{name}'", "'x'") for line in lines]


@pytest.mark.parametrize("name", architectures())
def test_an_architecture_has_at_most_two_hundred_lines(name):
    files = [ZOO / name / f"{what}_{name}.py" for what in ("configuration", "modeling")]
    assert sum(map(lines_of_code, files)) <= 200


def test_no_two_model_files_are_more_than_forty_percent_alike():
    files = {name: normalised(name) for name in architectures()}
    # A file of a dozen lines (another architecture's mixer under its own name) holds nothing that could be a copy.
    files = {name: lines for name, lines in files.items() if len(lines) > 12}
    assert len(files) > 20
    alike = {}
    for a, b in itertools.combinations(files, 2):
        alike[a, b] = difflib.SequenceMatcher(None, files[a], files[b], autojunk=False).ratio()
    worst = sorted(alike, key=lambda pair: -alike[pair])[:5]
    assert all(alike[pair] <= 0.4 for pair in worst), {pair: round(alike[pair], 2) for pair in worst}


@pytest.mark.parametrize("name", architectures())
def test_a_mixer_names_its_kernel_and_its_source(name):
    from rnnzoo.zoo.core.registry import mixer_class

    mixer = mixer_class(name)
    assert mixer.kernel and re.search(r"\d{4}", mixer.paper), name
    folder = ZOO.parent / "kernels" / mixer.kernel
    assert folder.is_dir() or mixer.kernel == "scaled_dot_product_attention"
