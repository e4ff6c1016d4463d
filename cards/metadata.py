"""The YAML block at the head of a card, as the Hub reads it."""

from __future__ import annotations

from typing import Any

import yaml

from .licences import hub_licence
from .view import View

__all__ = ["front_matter", "metadata"]


def metadata(view: View) -> dict[str, Any]:
    """Hub metadata of a model.

    The Hub has no relation "conversion": finetune is the nearest, and the method is a tag.
    """
    inherited = view.model.get("language") or view.teacher.get("language")
    data: dict[str, Any] = {"language": view.publish.get("language") or inherited or ["en"]}
    data |= hub_licence(view.licence)
    if data["license"] == "other":
        data.setdefault("license_name", "other")
    if data["license"] == "other" and view.base_id:
        data["license_link"] = f"https://huggingface.co/{view.base_id}"
    data["library_name"] = "peft" if view.kind == "adapter" else "transformers"
    data["pipeline_tag"] = "text-generation"
    data["tags"] = _tags(view)
    if ids := view.dataset_ids():
        data["datasets"] = ids
    if view.base_id:
        data["base_model"] = view.base_id
        data["base_model_relation"] = "adapter" if view.kind == "adapter" else "finetune"
    results = _model_index(view)
    if results:
        data["metrics"] = sorted({metric["type"] for result in results for metric in result["metrics"]})
        data["model-index"] = [{"name": view.name, "results": results}]
    if emitted := _emissions(view):
        data["co2_eq_emissions"] = emitted
    return data


def _tags(view: View) -> list[str]:
    if view.kind == "adapter":
        tags = ["rnnzoo", "peft", str(view.adapter.get("peft_type") or "adapter").lower()]
    else:
        kinds = view.model.get("layer_types") or []
        grows = "full_attention" in kinds or view.model.get("state_bytes_per_token")
        tags = ["rnnzoo", "rnn", "linear-rnn", "hybrid" if grows else "constant-memory", view.model.get("model_type")]
        tags.append(view.recipe.get("name"))
    return list(dict.fromkeys(str(tag) for tag in [*tags, *(view.publish.get("tags") or [])] if tag))


def _emissions(view: View) -> dict[str, Any]:
    """Grams, as the Hub wants them; only where they were measured."""
    work = view.conversion or view.training
    found = work.get("energy") or {}
    if found.get("emissions_kg") is None:
        return {}
    emitted = {
        "emissions": round(1000 * found["emissions_kg"], 6),
        "source": found.get("source"),
        "training_type": "fine-tuning" if view.kind == "converted" else "pre-training",
        "geographical_location": found.get("country"),
        "hardware_used": work.get("hardware"),
    }
    return {key: value for key, value in emitted.items() if value is not None}


def _model_index(view: View) -> list[dict[str, Any]]:
    """What the student reached, one entry for each data set."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for row in view.rows("perplexity", column="student"):
        how = f"windows of {row['window']}" + ("" if row.get("stride") is None else f", stride {row['stride']}")
        own = entries.setdefault(row["dataset"], [])
        args = {"window": row["window"], "stride": row.get("stride"), "tokens": row.get("n_tokens")}
        own.append(_metric("perplexity", row["value"], f"perplexity ({how})", args, row.get("stderr")))
        own.append(_metric("bits_per_byte", row["bits_per_byte"], f"bits per byte ({how})", args))
    for row in view.rows("tasks", column="student"):
        own = entries.setdefault(row["task"], [])
        name = f"{row['metric']} (n = {row['n']})"
        own.append(_metric(row["metric"], row["value"], name, {"n": row["n"]}, row.get("stderr")))
    return [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"type": name, "name": name},
            "metrics": metrics,
        }
        for name, metrics in entries.items()
    ]


def _metric(kind: str, value: float, name: str, args: dict[str, Any], stderr: float | None = None) -> dict[str, Any]:
    known = {key: item for key, item in (args | {"stderr": stderr and round(stderr, 4)}).items() if item is not None}
    return {"type": kind, "value": round(value, 4), "name": name, "args": known}


def front_matter(view: View) -> str:
    return yaml.safe_dump(metadata(view), sort_keys=False, allow_unicode=True, width=120).strip()
