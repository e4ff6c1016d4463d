"""results.json of a conversion or a training: what was asked for, what was done, what came out."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from ..zoo.core.configuration import RecurrentConfig
from ..zoo.core.sizes import causal_lm_class, layer_state_bytes, parameter_count, state_bytes, window_bytes
from .context import StageContext
from .data import PackedTokens, TextHashes, refuse_overlap
from .energy import energy_record
from .evaluation import Dataset, evaluate
from .evaluation.limits import LIMITS
from .run_folder import FINISHED, RANKING, Run, write_json

__all__ = ["evaluated_results", "write_results", "write_training_results"]


def write_results(run: Run, context: StageContext) -> dict[str, Any]:
    """Writes everything but the evaluation; what results.json holds of that stays."""
    recipe, dtype = context.recipe, context.dtype
    config = causal_lm_class(recipe.student).config_class.from_pretrained(run.out)
    done = [stage for stage in run.stages if stage["name"] != FINISHED]
    shown = [{k: v for k, v in stage.items() if k not in ("student", "kept", "teacher_perplexity")} for stage in done]
    text = yaml.safe_dump(_without_folders(recipe.to_dict()), sort_keys=False)
    records = {}
    for file in sorted((run.folder / "data").glob("*.safetensors")):
        records[file.stem] = PackedTokens.load(file).record()
    for file in sorted((run.folder / "data").glob("*.json")):  # of examples, which a stage has of its own
        records[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    results = _of_model(run, config, recipe.student, dtype)
    results["model"] |= {
        "state_bytes": state_bytes(config, dtype),
        "windows": getattr(config, "window_sizes", None),
        "feature_widths": getattr(config, "feature_widths", None),
        "window_bits": getattr(config, "ring_bits", None),
    }
    results["teacher"] = (results.get("teacher") or {}) | context.teacher.record()
    digest = hashlib.sha256(text.encode()).hexdigest()
    results["recipe"] = {"name": recipe.name, "sha256": digest, "yaml": text}
    training = [stage for stage in done if "loss_first" in stage]
    results["conversion"] = (results.get("conversion") or {}) | {
        "tokens": sum(stage["tokens"] for stage in training),
        "seed": context.seed,
        "seconds": sum(stage.get("seconds", 0) for stage in done),
        "hardware": _hardware(),
        "stages": shown,
        "data": ((results.get("conversion") or {}).get("data") or {}) | records,
    }
    ranking = run.folder / RANKING
    later = {
        "teacher_perplexity": next((s["teacher_perplexity"] for s in done if "teacher_perplexity" in s), None),
        "energy": energy_record(run.folder),
        "ranking": json.loads(ranking.read_text(encoding="utf-8")) if ranking.exists() else None,
    }
    results["conversion"] |= {name: value for name, value in later.items() if value}
    write_json(run.out / "results.json", results)
    return results


def evaluated_results(run: Run, context: StageContext) -> dict[str, Any]:
    """The same, and the student measured on text held out from the data, beside the teacher."""
    texts = context.evaluation_texts
    hashes = TextHashes.of(texts, "evaluation")
    for file in sorted((run.folder / "data").glob("*.safetensors")):
        refuse_overlap(hashes, PackedTokens.load(file).hashes)
    results = write_results(run, context)
    data = results["conversion"]["data"]
    # A run that neither calibrates nor trains has packed no text.
    source = [data[name]["source"] for name in ("training", "calibration") if name in data] or [context.corpus.source]
    characters = sum(map(len, texts))
    data["evaluation"] = {"sha256": hashes.sha256, "source": source[0], "characters": characters}
    write_json(run.out / "results.json", results)
    # Beyond the positions that it was trained on, the teacher is no measure of anything.
    window = min(LIMITS["quick"].windows[0], context.teacher.config.max_position_embeddings)
    return evaluate(
        run.out,
        teacher=context.teacher,
        datasets=[Dataset.of_texts("held-out text", texts)],
        limits=dataclasses.replace(LIMITS["quick"], windows=(window,)),
        dtype=context.dtype,
        progress=context.progress,
    )


def write_training_results(
    run: Run,
    config: RecurrentConfig,
    architecture: str,
    dtype: torch.dtype,
    report: dict[str, Any],
    about: dict[str, Any],
) -> dict[str, Any]:
    """The same of a training from scratch. report: of its stage. about: what else its section says."""
    results = _of_model(run, config, architecture, dtype)
    results["model"] |= {"state_bytes": state_bytes(config, dtype) + window_bytes(config, dtype)}
    done = {name: value for name, value in report.items() if name != "name"}
    results["training"] = done | about | {"hardware": _hardware(), "energy": energy_record(run.folder)}
    write_json(run.out / "results.json", results)
    return results


def _of_model(run: Run, config: RecurrentConfig, architecture: str, dtype: torch.dtype) -> dict[str, Any]:
    """The results that are there, with when they were made, by which version, and of which model."""
    path = run.out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"schema": 1}
    results.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
    with contextlib.suppress(PackageNotFoundError):  # run from a source tree
        results["rnnzoo_version"] = version("rnnzoo")
    results["model"] = (results.get("model") or {}) | {
        "name": run.out.resolve().name,
        "architecture": architecture,
        "model_type": config.model_type,
        "parameters": parameter_count(config),
        "dtype": str(dtype).removeprefix("torch."),
        "layer_types": config.layer_types,
        "layer_state_bytes": layer_state_bytes(config, dtype),
    }
    return results


def _hardware() -> str:
    return f"{torch.get_num_threads()} threads, {platform.machine()}"


def _without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the files of this machine that its stages read as their names alone."""
    for stage in recipe["stages"]:
        for name in ("data", "teacher"):
            if isinstance(stage.get(name), str) and Path(stage[name]).expanduser().exists():
                stage[name] = Path(stage[name]).name
    return recipe
