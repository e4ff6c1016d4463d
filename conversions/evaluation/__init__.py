"""Evaluation: student, teacher, and the teacher cut to a window of the student's state bytes, by one program.

from rnnzoo.conversions.evaluation import evaluate
results = evaluate("my-model", teacher="embedded", datasets=["test.txt", "lambada.jsonl"], limits="quick")
"""

from __future__ import annotations

from .limits import LIMITS, Limits
from .report import show
from .runner import evaluate
from .texts import Dataset

__all__ = ["LIMITS", "Dataset", "Limits", "evaluate", "show"]
