"""Imports go one way, kernels <- zoo <- conversions, and cards knows no model code."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "zoo", "conversions", "cards")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "zoo": {"kernels", "zoo"},
    "conversions": {"kernels", "zoo", "conversions", "cards"},
    "cards": {"cards"},
}
FOREIGN = {
    "kernels": {"transformers", "huggingface_hub", "accelerate", "datasets", "peft", "safetensors", "tokenizers"},
    "zoo": {"accelerate", "datasets", "peft"},
    "conversions": set(),
    "cards": {"torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "numpy"},
}


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported_modules(file: Path) -> Iterator[str]:
    """Absolute dotted names that a file of a room imports, as if the room were rnnzoo.<room>."""
    package = ["rnnzoo", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    wrong = []
    for file in python_files(room):
        for module in imported_modules(file):
            parts = module.split(".")
            shared = parts[:2] == ["rnnzoo", "kernels"] and parts[2] in (
                "errors",
                "files",
            )  # plain Python, for every room
            if parts[0] == "rnnzoo" and parts[1] in ROOMS and parts[1] not in MAY_IMPORT[room] and not shared:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
            if parts[0] in FOREIGN[room]:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_each_other_relatively(room):
    """Absolute names such as `zoo.core` exist only in a process started in the checkout."""
    for file in python_files(room):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
            assert not {name.split(".")[0] for name in names} & {*ROOMS, "rnnzoo"}, file


def test_kernels_does_not_shadow_the_package_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_linked_into_the_package(room):
    link = ROOT / "src" / "rnnzoo" / room
    assert link.is_dir() and link.resolve() == ROOT / room, f"{link} should be a symbolic link to ../../{room}"


@pytest.mark.parametrize("room", ROOMS)
def test_files_postpone_annotations_and_stay_readable(room):
    for file in python_files(room):
        text = file.read_text()
        assert "from __future__ import annotations" in text or not ast.parse(text).body[1:], file
        assert text.count("\n") < 600, f"{file} is too long to read"


def test_extras_and_groups_are_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"] == project["dependency-groups"]


def test_version_is_said_once_more_only_where_it_must_be():
    import rnnzoo

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == rnnzoo.__version__
    assert f"version: {rnnzoo.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_path_of_somebodys_machine():
    """Sources and documents name no absolute folder of a developer; `shared data` is found through options."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a Git checkout")
    for name in set(done.stdout.split("\n")) - {""}:
        file = ROOT / name
        if file.is_file() and file.suffix in {".py", ".md", ".toml", ".yaml", ".sh", ".j2", ".cff", ".c", ".h", ""}:
            found = re.search(r"(?<![\w.])/(work|root|home|Users)/\w+", file.read_text(errors="replace"))
            assert found is None, f"{name}: {found}"


def test_readme_names_every_command():
    from rnnzoo.cli import COMMANDS

    said = set(re.findall(r"^rnnzoo (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert said == set(COMMANDS)
