"""Checks a card without the Hub: its metadata, its sections, its links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from .handwritten import without_notes
from .licences import HUB_LICENCES

__all__ = ["SECTIONS", "validate_card", "validate_metadata"]

_BEFORE = ("What it is", "Use", "Notes")
_MEASURED = (
    "Quality",
    "Quality by position",
    "Recall by distance",
    "Memory",
    "Decoding speed",
    "At once and token by token",
)
_AFTER = ("Data", "Limits", "Environment", "Reproduce", "Citation", "Licence")
# By kind of card. A model of another origin shows the measured sections where something was measured.
SECTIONS = {
    "converted": (*_BEFORE, *_MEASURED, "Layers", "Conversion", "Energy", *_AFTER),
    "trained": (*_BEFORE, *_MEASURED, "Layers", "Training", "Energy", *_AFTER),
    "model": (*_BEFORE, "Quality", "Limits", "Citation", "Licence"),
    "adapter": (*_BEFORE, "Limits", "Citation", "Licence"),
}
_RELATIONS = {"adapter", "merge", "quantized", "finetune"}
_LOCAL_PATH = re.compile(r"(?<![\w/.:])/(?:home|root|tmp|work|mnt|Users|var|data)/[^\s)`|]+")


def validate_card(text: str, folder: str | Path | None = None) -> list[str]:
    """Every problem of a card as one sentence; an empty list is a valid card.

    Args:
        text: the whole README.md; what people wrote between the marks is theirs and not checked.
        folder: where its relative links point; None leaves links unchecked.
    """
    problems, body = _parted(text)
    if body is None:
        return problems
    body = without_notes(body)
    return [*problems, *_body(body), *(_links(body, Path(folder)) if folder is not None else [])]


def validate_metadata(text: str) -> list[str]:
    """As `validate_card`, of the block at the head alone: what the Hub reads, also of a card written by hand."""
    return _parted(text)[0]


def _parted(text: str) -> tuple[list[str], str | None]:
    """The problems of the metadata, and the text behind it; None where the metadata cannot be read."""
    match = re.match(r"\A---\n(.*?)\n---\n(.*)\Z", text, re.DOTALL)
    if not match:
        return ["The card does not start with a metadata block between lines of three dashes."], None
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"The metadata is not YAML: {' '.join(str(error).split())}."], None
    if not isinstance(data, dict):
        return ["The metadata is not a mapping."], None
    return _metadata(data), match[2]


def _metadata(data: dict[str, Any]) -> list[str]:
    needed = ("language", "license", "library_name", "pipeline_tag", "tags")
    problems = [f"The metadata has no {key}." for key in needed if not data.get(key)]
    if "licence" in data:
        problems.append("The metadata key is license, not licence.")
    if data.get("license") and data["license"] not in HUB_LICENCES:
        problems.append(f"The Hub knows no license {data['license']!r}: use other with license_name.")
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append("license: other needs license_name.")
    if data.get("pipeline_tag") not in (None, "text-generation", "text-classification"):
        problems.append(f"pipeline_tag {data['pipeline_tag']!r} is not one of this library's models.")
    for key in ("tags", "datasets", "metrics", "language"):
        value = data.get(key, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
            problems.append(f"{key} must be a list of strings.")
    for key in ("base_model", "datasets"):
        for one in _as_list(data.get(key) or None):
            if not re.fullmatch(r"[\w.-]+/[\w.-]+" if key == "base_model" else r"([\w.-]+/)?[\w.-]+", str(one)):
                problems.append(f"{key} {one!r} is not a Hub id of the form owner/name.")
    for language in _as_list(data.get("language")):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code", str(language)):
            problems.append(f"language {language!r} is not a code such as en.")
    if re.search(r"\s", str(data.get("library_name") or "")):
        problems.append("library_name must be one word.")
    if data.get("base_model_relation") not in (None, *_RELATIONS):
        problems.append(
            f"base_model_relation {data['base_model_relation']!r} is none of {', '.join(sorted(_RELATIONS))}."
        )
    return [*problems, *_emissions(data.get("co2_eq_emissions")), *_model_index(data.get("model-index"))]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _emissions(emitted: Any) -> list[str]:
    """A number of grams, or a mapping with it."""
    if emitted is None:
        return []
    grams = emitted.get("emissions") if isinstance(emitted, dict) else emitted
    if isinstance(grams, bool) or not isinstance(grams, int | float) or grams < 0:
        return ["co2_eq_emissions must hold emissions, a number of grams."]
    return []


def _model_index(index: Any) -> list[str]:
    """As the Hub's own library reads it."""
    if index is None:
        return []
    try:
        _, results = model_index_to_eval_results(index)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"The model-index lacks a name, a task, a data set, or has no metric with a type ({error})."]
    if not results or not all(isinstance(result.metric_value, int | float) for result in results):
        return ["The model-index has no metric, or one that is no number."]
    return []


def _body(body: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^## (.+)$", prose, re.MULTILINE)
    kind = re.search(r"^<!-- Rendered by rnnzoo[^>]*\bkind: (\w+)", prose, re.MULTILINE)
    expected = SECTIONS.get(kind[1] if kind else "", SECTIONS["converted"])
    missing = [section for section in expected if section not in headings]
    problems = [f"The section {section!r} is missing." for section in missing]
    if not re.search(r"^# \S", prose, re.MULTILINE):
        problems.append("The card has no title.")
    if re.search(r"\{\{|\}\}|\{%|%\}", prose):
        problems.append("The card holds unrendered template marks.")
    if re.search(r"\b(?:None|nan|inf)\b", "\n".join(line for line in prose.splitlines() if line.startswith("|"))):
        problems.append("A table holds None, nan or inf where a number or 'not measured' belongs.")
    widths: list[int] = []
    for line in [*prose.splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            widths.append(len(cells))
            if not all(text.strip() for text in cells):
                problems.append(f"A table cell is empty: {line}")
        elif widths:
            if len(set(widths)) > 1:
                problems.append("The rows of a table have different numbers of cells.")
            widths = []
    if found := _LOCAL_PATH.search(body):
        problems.append(f"The card names a path of one machine: {found[0]}.")
    return problems


def _links(body: str, folder: Path) -> list[str]:
    targets = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", body)
    return [
        f"The link to {target} leads nowhere."
        for target in targets
        if not re.match(r"[a-z]+:|#", target) and not (folder / target).exists()
    ]
