"""What is installed along with rnnzoo: free of the GPL, and named twice alike in pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GPL = re.compile(r"\bA?GPL|GNU (Affero )?General Public", re.IGNORECASE)


def closure(requirements: list[str]) -> set[str]:
    """Installed distributions that these need, and those that they need, without extras."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [Requirement(line) for line in needs]
    return found


def licence(name: str) -> str:
    """All that a distribution says of its licence."""
    metadata = importlib.metadata.metadata(name)
    said = [metadata.get("License-Expression") or "", *(metadata.get_all("Classifier") or [])]
    words = [line for line in said if "licen" in line.lower() or line == said[0]]
    if not any(words):
        words = [(metadata.get("License") or "")[:200]]
    return " | ".join(words)


def under_the_gpl(words: str) -> bool:
    """LGPL is not the GPL, and of alternatives one that is not suffices."""
    without = re.sub(r"LGPL|GNU Lesser General Public|GNU Library", "", words, flags=re.IGNORECASE)
    return bool(GPL.search(without)) and " OR " not in words


def test_no_dependency_is_under_the_gpl():
    names = closure(PROJECT["project"]["dependencies"])
    assert {"torch", "transformers", "huggingface-hub", "safetensors", "tqdm"} <= names
    assert {name: licence(name) for name in names if under_the_gpl(licence(name))} == {}


def test_the_gpl_is_recognised():
    assert under_the_gpl("GPL-3.0-only") and under_the_gpl("License :: OSI Approved :: GNU General Public License v3")
    assert not under_the_gpl("LGPL-2.1") and not under_the_gpl("MIT OR GPL-2.0") and not under_the_gpl("Apache-2.0")


def test_every_core_dependency_has_a_least_version():
    """`scripts/minimum_versions.sh` installs just these."""
    for line in PROJECT["project"]["dependencies"]:
        assert any(part.operator == ">=" for part in SpecifierSet(str(Requirement(line).specifier))), line
