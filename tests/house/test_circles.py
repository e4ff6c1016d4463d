"""No module is imported by what it imports, also inside functions and for types alone."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "rnnzoo"
ROOMS = ("cards", "conversions", "kernels", "zoo")  # links: pathlib does not follow them by itself


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name -> file, of a package whose name is its folder's."""
    files = [*package.rglob("*.py"), *(f for room in ROOMS for f in (package / room).rglob("*.py"))]
    parts = {file: [package.name, *file.relative_to(package).with_suffix("").parts] for file in files}
    return {".".join(names[:-1] if names[-1] == "__init__" else names): file for file, names in parts.items()}


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> those of `known` that an import statement anywhere in it names."""
    found: dict[str, set[str]] = {}
    for module, file in known.items():
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                base = ".".join([*base, *([node.module] if node.module else [])])
                inner = {alias.name: f"{base}.{alias.name}" for alias in node.names}
                names |= {name if name in known else base for name in inner.values()}
        found[module] = (names & known.keys()) - {module}
    return found


def a_circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle in their order, the first once more at the end; none: []."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_there_are_no_circles_of_imports():
    graph = imports(modules())
    assert len(graph) > 300
    assert a_circle(graph) == []


@pytest.mark.parametrize(
    "back",
    [
        "from .a import A",
        "def f():\n    from . import a",
        "import typing\nif typing.TYPE_CHECKING:\n    from ..pack import a",
        "import pack.a",
    ],
)
def test_a_circle_is_found_wherever_its_import_stands(tmp_path, back):
    package = tmp_path / "pack"
    package.mkdir()
    for name, text in {"__init__": "", "a": "from .c import C", "c": "from . import b", "b": back}.items():
        (package / f"{name}.py").write_text(text)
    assert {"pack.a", "pack.b", "pack.c"} == set(a_circle(imports(modules(package))))
    (package / "b.py").write_text("")
    assert a_circle(imports(modules(package))) == []
