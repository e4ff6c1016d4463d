"""Recipes compared: the same teacher, text, tokens and seed for all, the same measures, one row a conversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..conversions.evaluation import Limits, evaluate
from ..conversions.evaluation.window_baseline import kv_bytes_per_token
from ..conversions.recipes import list_recipes
from ..conversions.teachers import TeacherRef
from ..kernels.files import replace_text

__all__ = ["DISTANCES", "Run", "bounded_cache", "figures_of", "grid", "measure", "recipe_table"]

DISTANCES = (64, 512, 2048)
OURS = "rnnzoo"
BUDGETS = {"rnnzoo": 4_000_000, "rnnzoo-1.5MB": 1_500_000}


@dataclasses.dataclass(frozen=True)
class Run:
    """One conversion.

    Attributes:
        label: of the recipe in the table. recipe, options: what `convert` is told.
    """

    label: str
    recipe: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder."""
        keep, tokens = self.options.get("keep", "recipe"), self.options.get("tokens", 0)
        return f"{self.label}-keep-{keep.replace('/', '-')}-{tokens}"


def grid(recipes: Sequence[str], tokens: Iterable[int], keeps: Iterable[str], student: str | None) -> list[Run]:
    """Every recipe at every number of tokens and every `keep`, fewest tokens first.

    Args:
        recipes: names, or () for all; ours is there at two budgets of state. student: ours as well with this mixer,
            which has no window and no sinks; None: not.
    """
    names, options = recipes or list_recipes(), {}
    if OURS in names:
        options = {label: (OURS, {"state_budget": budget}) for label, budget in BUDGETS.items()}
        options |= {f"{OURS} --student {student}": (OURS, {"student": student})} if student else {}
    options |= {name: (name, {}) for name in names if name != OURS}
    return [
        Run(label, recipe, extra | {"tokens": count, "keep": keep})
        for count in tokens
        for keep in keeps
        for label, (recipe, extra) in options.items()
    ]


def bounded_cache(teacher: TeacherRef, state_bytes: int, folder: Path) -> Run:
    """The teacher with a cache bounded by TOVA to `state_bytes`, as a recipe that trains nothing, in `folder`."""
    states = max(1, state_bytes // kv_bytes_per_token(teacher.config))
    recipe = {
        "name": f"tova-{states}",
        "student": "tova",
        "student_options": {"tova_states": states},
        "tokens": 0,
        "stages": [{"name": "none", "kind": "train", "share": 0.0}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tova-{states}.yaml"
    replace_text(path, yaml.safe_dump(recipe, sort_keys=False))
    return Run(f"tova-{states}", str(path), {"tokens": 0, "keep": "none"})


def measure(
    run: Run,
    folder: Path,
    *,
    teacher: str,
    data: Sequence[str],
    files: Sequence[str],
    columns: Sequence[str],
    windows: tuple[int, ...] = (2048,),
    eval_tokens: int = 16_384,
    items: int = 400,
    progress: Any = None,
) -> dict[str, Any]:
    """Converts (what is finished in `folder` is not done again), measures, and returns the row of the table."""
    from ..conversions.convert import convert

    done = convert(teacher, run.recipe, folder, data=list(data), evaluate=False, progress=progress, **run.options)
    limits = Limits(
        windows=windows,
        perplexity_tokens=eval_tokens,
        task_items=items,
        distances=DISTANCES,
        recall_contexts=(),
        ablation_tokens=0,
        contexts=(),
        position_tokens=max(windows),
        parity_steps=0,
        sample_tokens=0,
    )
    results = evaluate(folder, teacher=teacher, datasets=files, columns=columns, limits=limits, progress=progress)
    row = {"run": run.label, "keep": run.options["keep"], "tokens": run.options["tokens"]}
    return row | figures_of(results) | {"minutes": round(done["conversion"]["seconds"] / 60, 1)}


def figures_of(results: dict[str, Any]) -> dict[str, Any]:
    """results.json as one flat row: state_bytes, ppl_<window>_<column>, <task>_<column>, recall_<distance>_<column>."""
    model, evaluation = results["model"], results["evaluation"]
    found: dict[str, Any] = {"state_bytes": model["state_bytes"], "bytes_per_token": model["state_bytes_per_token"]}
    found["trained_tokens"] = results["conversion"]["tokens"]
    for row in evaluation["perplexity"]:
        if row.get("stride") in (None, row["window"]):
            found[f"ppl_{row['window']}_{row['column']}"] = row["value"]
    for row in evaluation["tasks"]:
        if row["metric"] == "accuracy":
            found[f"{row['task']}_{row['column']}"] = row["value"]
    for row in evaluation["recall"]:
        found[f"recall_{row['distance']}_{row['column']}"] = row["accuracy"]
    return found


def recipe_table(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    """Markdown: one row a conversion, the teacher's values last."""
    heads = ["recipe", "kept", "tokens", "state MB", "perplexity", "of the teacher's", *tasks]
    heads += [f"recall at {distance:,}" for distance in DISTANCES] + ["minutes"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    names = ["ppl_2048", *tasks, *(f"recall_{distance}" for distance in DISTANCES)]
    teacher = {name: next((r[f"{name}_teacher"] for r in rows if f"{name}_teacher" in r), None) for name in names}
    for row in rows:
        ratio = _ratio(row.get("ppl_2048_student"), teacher["ppl_2048"])
        state = f"{row['state_bytes'] / 1e6:.2f}" + (" and caches" if row["bytes_per_token"] else "")
        values = [_shown(row.get(f"{name}_student")) for name in names]
        cells = [row["run"], row["keep"], f"{row['tokens']:,}", state, values[0], ratio, *values[1:], row["minutes"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    values = [_shown(teacher[name]) for name in names]
    cells = ["teacher", "all", "-", "cache", values[0], "1.00", *values[1:], "-"]
    return "\n".join([*lines, f"| {' | '.join(cells)} |", ""])


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _ratio(value: float | None, teacher: float | None) -> str:
    return "-" if value is None or not teacher else f"{value / teacher:.3g}"
