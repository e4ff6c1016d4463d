"""BibTeX of what a model is made of: the toolkit, the architecture, the recipe, and the teacher."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import yaml

__all__ = ["bibtex", "citations", "known_citations"]


@functools.cache
def known_citations() -> dict[str, Any]:
    """citations.yaml: keys by architecture, recipe and teacher, and the entries."""
    return yaml.safe_load((Path(__file__).parent / "citations.yaml").read_text(encoding="utf-8"))


def bibtex(key: str) -> str:
    """One known entry as BibTeX."""
    entry = known_citations()["entries"][key]
    fields = {"title": f"{{{entry['title']}}}", "author": entry["author"], "year": entry["year"]}
    arxiv = {"eprint": entry["arxiv"], "archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{entry['arxiv']}"}
    return _entry("misc", key, **fields, **arxiv)


def _entry(kind: str, key: str, **fields: Any) -> str:
    stated = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key},", *stated, "}"])


def citations(results: dict[str, Any], teacher_id: str | None, architecture: str | None) -> list[str]:
    """BibTeX entries in order: toolkit, methods, teacher; each once.

    The teacher's own card goes first (`teacher.citation` in results.json); then what is known of its family; a teacher
    with neither is cited by its address and commit.
    """
    known = known_citations()
    teacher = results.get("teacher") or results.get("import") or {}
    layers = (results.get("model") or {}).get("layer_types") or []
    keys = [*known["architectures"].get(str(architecture), [])]
    for layer in dict.fromkeys(layers):
        keys += known["architectures"].get(str(layer).split(".")[0], [])
    keys += known["recipes"].get((results.get("recipe") or {}).get("name") or "", [])
    own = [] if teacher.get("citation") else _teacher_keys(known, teacher_id)
    found = [_toolkit(results), *(bibtex(key) for key in dict.fromkeys([*keys, *own]))]
    if teacher.get("citation"):
        found.append(str(teacher["citation"]).strip())
    elif teacher_id and not own:
        found.append(_address(teacher_id, teacher.get("sha")))
    return found


def _teacher_keys(known: dict[str, Any], teacher_id: str | None) -> list[str]:
    return [
        key
        for start, keys in known["teachers"].items()
        if teacher_id and (teacher_id == start or teacher_id.startswith(f"{start}-"))
        for key in keys
    ]


def _toolkit(results: dict[str, Any]) -> str:
    title = "rnnzoo: recurrent language models, and the way from a Transformer to one"
    year = str(results.get("created") or "")[:4]
    return _entry("software", "rnnzoo", title=title, version=results.get("rnnzoo_version"), year=year)


def _address(teacher_id: str, sha: Any) -> str:
    key = re.sub(r"[^A-Za-z0-9]+", "-", teacher_id.split("/")[-1]).strip("-").lower()
    return _entry("misc", key, title=teacher_id, howpublished=f"\\url{{https://huggingface.co/{teacher_id}}}", note=sha)
