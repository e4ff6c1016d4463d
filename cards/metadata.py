"""The YAML block at the head of a card, as the Hub reads it."""

from __future__ import annotations

from typing import Any

import yaml

from .licences import hub_licence
from .view import View

__all__ = ["front_matter", "metadata"]


def metadata(view: View) -> dict[str, Any]:
    """Hub metadata of a converted model.

    The Hub has no relation "conversion": finetune is the nearest, and the method is a tag.
    """
    data: dict[str, Any] = {"language": view.model.get("language") or view.teacher.get("language") or ["en"]}
    data |= hub_licence(view.teacher.get("licence"))
    data["library_name"] = "transformers"
    data["pipeline_tag"] = "text-generation"
    tags = ["rnnzoo", "rnn", "linear-rnn", "constant-memory", view.model.get("model_type"), view.recipe.get("name")]
    kinds = view.model.get("layer_types") or []
    if "full_attention" in kinds or view.model.get("state_bytes_per_token"):
        tags = [tag for tag in tags if tag != "constant-memory"] + ["hybrid"]
    data["tags"] = list(dict.fromkeys(str(tag) for tag in tags if tag))
    if ids := _dataset_ids(view):
        data["datasets"] = ids
    if view.teacher_id:
        data["base_model"] = view.teacher_id
        data["base_model_relation"] = "finetune"
    results = _model_index(view)
    if results:
        data["metrics"] = sorted({metric["type"] for result in results for metric in result["metrics"]})
        data["model-index"] = [{"name": view.name, "results": results}]
    return data


def _dataset_ids(view: View) -> list[str]:
    parts = view.conversion.get("data") or {}
    ids = [part.get("hub_id") for part in parts.values() if isinstance(part, dict)]
    return list(dict.fromkeys(i for i in ids if i))


def _model_index(view: View) -> list[dict[str, Any]]:
    """What the student reached, one entry for each data set."""
    entries = []
    for row in view.rows("perplexity", column="student"):
        how = f"windows of {row['window']}" + ("" if row.get("stride") is None else f", stride {row['stride']}")
        metrics = [
            {"type": "perplexity", "value": round(row["value"], 4), "name": f"perplexity ({how})"},
            {"type": "bits_per_byte", "value": round(row["bits_per_byte"], 4), "name": f"bits per byte ({how})"},
        ]
        entries.append(_entry(row["dataset"], metrics))
    for row in view.rows("tasks", column="student"):
        entries.append(
            _entry(
                row["task"],
                [{"type": row["metric"], "value": round(row["value"], 4), "name": f"{row['metric']} (n = {row['n']})"}],
            )
        )
    return entries


def _entry(dataset: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": dataset, "name": dataset},
        "metrics": metrics,
    }


def front_matter(view: View) -> str:
    return yaml.safe_dump(metadata(view), sort_keys=False, allow_unicode=True, width=120).strip()
