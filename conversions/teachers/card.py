"""What a teacher's own card says: its licence, what it was made from, how to cite it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

__all__ = ["stated_in_card"]

CITATION_CHARACTERS = 6000


def stated_in_card(folder: Path) -> dict[str, Any]:
    """licence, licence_name, language, derived_from (Hub ids) and citation (BibTeX) of README.md, as far as stated."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    data = _front_matter(front[1]) if front else {}
    found: dict[str, Any] = {
        "licence": _word(data.get("license")),
        "licence_name": _word(data.get("license_name")),
        "language": [str(one) for one in _listed(data.get("language"))],
        "derived_from": [str(one) for one in _listed(data.get("base_model"))],
        "citation": _bibtex(text),
    }
    return {name: value for name, value in found.items() if value}


def _front_matter(text: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:  # one bad line must not hide the licence
        stated = re.search(r"^license:\s*[\"']?([\w.+-]+)", text, re.MULTILINE)
        return {"license": stated[1]} if stated else {}
    return data if isinstance(data, dict) else {}


def _word(value: Any) -> str | None:
    """A licence may be a list of one."""
    words = _listed(value)
    return str(words[0]).strip() or None if words else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def _bibtex(text: str) -> str | None:
    """The fenced blocks that hold BibTeX entries."""
    blocks = re.findall(r"^```[ \t]*\w*[ \t]*\n(\s*@\w+\s*\{.*?)^```", text, re.DOTALL | re.MULTILINE)
    found = "\n\n".join(block.strip() for block in blocks)
    return found if found and len(found) <= CITATION_CHARACTERS else None
