"""New rows into the evaluation part of an older results.json, without mixing models."""

from __future__ import annotations

from typing import Any

from .columns import COLUMNS, Opened
from .environment import QUALITY, SPEED, conditions

__all__ = ["PARTS", "merge", "still_valid"]

PARTS = ("perplexity", "tasks", "recall", "decode", "by_position", "parity", "recall_by_context", "ablations")
# Rows of these parts stand for themselves; those of the other parts are one curve for each column, replaced as a whole.
_SINGLE = {"perplexity": ("dataset", "window", "stride"), "tasks": ("task", "metric")}


def still_valid(results: dict[str, Any], opened: Opened, environment: dict[str, str]) -> dict[str, Any]:
    """What of an older evaluation is of the same models (everything, the student's rows, or nothing) and conditions."""
    evaluation, before = results.get("evaluation") or {}, results.get("environment") or {}
    student = opened.student.sha256
    teacher = opened.teacher["sha"] if opened.teacher else evaluation.get("teacher_sha")
    kept: dict[str, Any] = {"student_sha256": student, "teacher_sha": teacher}
    if evaluation.get("student_sha256") != student or _differ(before, environment, QUALITY):
        return kept
    kept = {**evaluation, **kept}
    if _differ(before, environment, SPEED):
        kept["decode"] = []
    if evaluation.get("teacher_sha") != teacher:
        kept.pop("window_baseline", None)
        for part in PARTS:
            kept[part] = [row for row in kept.get(part, []) if row["column"] == "student"]
    return kept


def _differ(before: dict[str, str], now: dict[str, str], names: tuple[str, ...]) -> bool:
    return conditions(before, names) != conditions(now, names)


def merge(evaluation: dict[str, Any], parts: dict[str, list[dict[str, Any]]]) -> None:
    """Puts the new rows of each part into `evaluation`, in place of the older rows that they measure again."""
    for part, rows in parts.items():
        fields = _SINGLE.get(part, ())
        new = {(row["column"], *(row.get(field) for field in fields)) for row in rows}
        old = [
            row for row in evaluation.get(part, []) if (row["column"], *(row.get(field) for field in fields)) not in new
        ]
        evaluation[part] = [*old, *rows]
    present = {row["column"] for part in parts for row in evaluation[part]}
    evaluation["columns"] = [column for column in COLUMNS if column in present]
