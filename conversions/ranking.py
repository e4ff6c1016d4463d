"""Which layers a conversion should keep as attention: how much each matters, by forward passes alone.

    bypass_kl    KL(teacher || teacher without the mixer of one layer)
    swap_kl      KL(teacher || teacher with that mixer replaced by the student's, calibrated but not trained)

both means over every fourth token, in nats, on calibration text. The ranking is by swap_kl: what a layer costs when it
is converted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.cache import cache_root
from ..kernels.errors import RnnzooError
from ..kernels.files import replace_text
from ..kernels.losses import linear_kl
from ..zoo.core.heads import RecurrentForCausalLM
from ..zoo.core.mixer import Context
from .context import StageContext, StageRun
from .recipes import Recipe
from .recipes.keep import check_ranking
from .teachers import TeacherRef

__all__ = ["default_path", "load_ranking", "measure_layers", "rank_layers", "save_ranking"]

TOKENS = 2048  # of calibration text, at least: each layer takes two passes over them, from its place on
EVERY = 4  # tokens for one whose predictions are compared: the head is a large part of a small model
SCHEMA = 1


def rank_layers(context: StageContext) -> dict[str, Any]:
    """Measures every layer on the first tokens of the calibration text.

    Returns:
        A record with `order`, the layers with the most important first, and `layers`, the figures of each.
    """
    started = time.monotonic()
    data = context.calibration()
    data = data.rows(0, min(len(data), -(-TOKENS // data.seq_len)))
    student = calibrated_student(context)
    report = lambda done, total: context.progress("select", done, total, {})  # noqa: E731
    figures = measure_layers(context.teacher_model, student.to(context.compute_dtype).eval(), data, report)
    order = sorted(range(len(figures)), key=lambda i: (-figures[i]["swap_kl"], -figures[i]["bypass_kl"], i))
    return {
        "schema": SCHEMA,
        "teacher": context.teacher.sha,
        "recipe": context.recipe.name,
        "student": context.recipe.student,
        "tokens": data.num_tokens,
        "seconds": round(time.monotonic() - started, 1),
        "order": order,
        "layers": [{"layer": i, "rank": order.index(i) + 1} | figures[i] for i in range(len(figures))],
    }


def calibrated_student(context: StageContext) -> Any:
    """A student of which every layer is converted, after the recipe's closed forms."""
    student = context.initialise(None, [])
    layers = list(range(student.config.num_hidden_layers))
    for stage in context.recipe.stages:
        if (first := stage.for_ranking()) is None:
            break  # what comes after training is for a trained student
        student, _ = first.run(context, student, StageRun("select", range(0), layers))
    return student


@torch.no_grad()
def measure_layers(
    teacher_model: RecurrentForCausalLM,
    student: RecurrentForCausalLM,
    data: Any,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, float]]:
    """{bypass_kl, swap_kl} of every layer.

    Args:
        teacher_model: every layer attention. student: of the same type, with a mixer for each of its layers.
        data: rows of tokens, see `PackedTokens`.
    """
    layers = len(teacher_model.model.layers)
    sums = torch.zeros(layers, 2, dtype=torch.float64)
    for number in range(len(data)):
        row = data[number]
        ids, seq_ids = row["input_ids"][None], row["seq_ids"][None]
        outputs = teacher_model.model(input_ids=ids, seq_ids=seq_ids, use_cache=False, output_hidden_states=True)
        for i in range(layers):
            ctx = student.model.make_context(*ids.shape, ids.device, seq_ids=seq_ids)
            own = student.model.layers[i].mixer
            for j, mixer in enumerate((torch.zeros_like, lambda x, own=own, ctx=ctx: own(x, None, ctx)[0])):
                changed = _with_mixer(teacher_model, outputs.hidden_states[i], i, mixer, ids, seq_ids)
                sums[i, j] += _divergence(teacher_model, outputs.last_hidden_state, changed)
            progress((number * layers + i + 1) * data.seq_len // layers, data.num_tokens)
    return [{"bypass_kl": float(a), "swap_kl": float(b)} for a, b in sums / len(data)]


def _with_mixer(
    teacher_model: RecurrentForCausalLM,
    hidden: Tensor,
    first: int,
    mixer: Callable[[Tensor], Tensor],
    ids: Tensor,
    seq_ids: Tensor,
) -> Tensor:
    """The teacher's final hidden states where layer `first`, whose input is `hidden` (B, T, D), has another mixer."""
    ctx: Context = teacher_model.model.make_context(*ids.shape, ids.device, seq_ids=seq_ids)
    hook = teacher_model.model.layers[first].mixer.register_forward_hook(lambda _, args, out: (mixer(args[0]), out[1]))
    try:
        for block in list(teacher_model.model.layers)[first:]:
            hidden = block(hidden, None, ctx, None)[0]
    finally:
        hook.remove()
    return teacher_model.model.norm(hidden)


def _divergence(teacher_model: RecurrentForCausalLM, true: Tensor, changed: Tensor) -> float:
    """KL of the predictions, a mean over every fourth token, from final hidden states (B, T, D)."""
    weight = teacher_model.lm_head.weight
    changed, true = (hidden[:, EVERY - 1 :: EVERY].flatten(0, 1) for hidden in (changed, true))
    return float(linear_kl(changed, weight, true, weight))


# Files ----------------------------------------------------------------------------------------------------------------


def default_path(teacher: TeacherRef, recipe: Recipe) -> Path:
    """Where `plan --select` keeps a ranking: by teacher, recipe and student."""
    return cache_root() / "rankings" / f"{teacher.sha.split(':')[-1][:16]}-{recipe.name}-{recipe.student}.json"


def save_ranking(path: Path, ranking: dict[str, Any]) -> None:
    """Writes it whole or not at all.

    Raises:
        RnnzooError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(ranking, indent=1) + "\n")
    except OSError as error:
        raise RnnzooError(f"The ranking cannot be written to {path}: {error.strerror or error}.") from error


def load_ranking(path: str | Path, teacher: TeacherRef, student: str) -> list[int]:
    """All layers of the teacher, the most important first.

    Raises:
        RnnzooError: no ranking, or one of another teacher or student.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        order, known, mixer = list(found["order"]), found["teacher"], found["student"]
    except OSError as error:
        raise RnnzooError(f"The ranking {path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RnnzooError(f"{path} is no ranking of layers, such as `rnnzoo plan --select` makes.") from error
    for what, theirs, ours in (("teacher", known, teacher.sha), ("student", mixer, student)):
        if theirs != ours:
            raise RnnzooError(
                f"The ranking {path} is of the {what} {theirs}, but this conversion's is {ours}; make one for it with "
                "`rnnzoo plan --select`."
            )
    check_ranking(order, teacher.config.num_hidden_layers, f"The file {path}")
    return order
