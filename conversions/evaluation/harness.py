"""Tasks of EleutherAI's lm-eval, where it is installed (extra `eval`) and its data can be had."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...kernels.errors import RnnzooError

__all__ = ["lm_eval_tasks", "require_lm_eval"]


def require_lm_eval(tasks: Sequence[str]) -> None:
    """Raises:
    RnnzooError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RnnzooError(f"The tasks {', '.join(tasks)} need lm-eval: install it with pip install 'rnnzoo[eval]'.")


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    max_items: int | None = None,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Runs lm-eval tasks: one row [{task, metric, value, stderr, n}] for every numeric metric.

    Raises:
        RnnzooError: lm-eval is not installed, does not know a task, or cannot get its data.
    """
    require_lm_eval(tasks)
    import lm_eval

    from .lm_eval_model import RnnzooLM

    wrapped = RnnzooLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        output = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=max_items, bootstrap_iters=1000)
    except (KeyError, OSError, ValueError) as error:
        raise RnnzooError(
            f"lm-eval could not run {', '.join(tasks)} ({type(error).__name__}: {' '.join(str(error).split())[:200]}): "
            "check the names and that the Hub can be reached."
        ) from error
    return _rows(output)


def _rows(output: dict[str, Any]) -> list[dict[str, Any]]:
    """lm-eval names metrics `acc,none` and their errors `acc_stderr,none`."""
    rows = []
    for task, metrics in output["results"].items():
        for name, value in metrics.items():
            metric, _, variant = name.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{variant}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if variant in ("", "none") else f"{metric} ({variant})",
                    "value": value,
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "n": output.get("n-samples", {}).get(task, {}).get("effective"),
                }
            )
    return rows
