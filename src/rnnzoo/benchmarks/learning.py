"""Does it learn? Every architecture at equal parameters and equal steps, on text, recall and regular languages.

An architecture's width is chosen so that the model has the parameters that were asked for; depth, data, steps, batch
and learning rate are the same for all. Training is in float32.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conversions.data.synthetic import LANGUAGES, NO_ANSWER, Answers, mqar
from ..kernels.errors import RnnzooError
from ..zoo.core.cache import RecurrentCache
from ..zoo.core.configuration import RecurrentConfig
from ..zoo.core.sizes import architecture_config, causal_lm_class, parameter_count

__all__ = ["TASKS", "Task", "config_of", "learn", "make_task"]

TASKS = ("text", "recall", *LANGUAGES)
WIDTH_STEP = 8
LENGTHS = (10, 20, 40, 64, 96, 128, 192, 256)  # of words that are tested; the longest trained is 40
NEAR = 8  # accuracy at a length: of the answers at its last so many symbols
STATE_TOKENS = 256  # after which the bytes of the state are read
Model = Callable[[Tensor], Tensor]  # (B, T) ids -> (B, T, V) logits


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        share: of the parameters that text models have. layers, vocab_size: of the model. batch: rows of a step.
        steps, learning_rate: defaults. draw: (rows, share of the training that is done, generator) -> Answers.
        measure: model -> figures.
    """

    name: str
    share: float
    layers: int
    vocab_size: int
    batch: int
    steps: int
    learning_rate: float
    draw: Callable[[int, float, torch.Generator], Answers]
    measure: Callable[[Model], dict[str, Any]]


def make_task(name: str, text: str | Path | None = None) -> Task:
    """One of TASKS.

    Args:
        text: the file of "text", read as bytes; its last tenth is held out.
    Raises:
        RnnzooError: unknown name, no text, or too short a text.
    """
    if name not in TASKS:
        raise RnnzooError(f"'{name}' is no task; known are {', '.join(TASKS)}.")
    return _text_task(text) if name == "text" else _recall_task() if name == "recall" else _language_task(name)


def _text_task(file: str | Path | None, context: int = 256, windows: int = 128) -> Task:
    if file is None:
        raise RnnzooError("The task text needs a file; give --text, or leave the task out with --task.")
    content = torch.frombuffer(bytearray(Path(file).read_bytes()), dtype=torch.uint8).long()
    if len(content) < 40 * context:
        raise RnnzooError(f"{file} has {len(content)} bytes; at least {40 * context} are needed.")
    train, held_out = content[: len(content) * 9 // 10], content[len(content) * 9 // 10 :]

    def rows(source: Tensor, starts: Tensor) -> Answers:
        taken = source[starts[:, None] + torch.arange(context + 1)]
        return Answers(taken[:, :-1], taken[:, 1:])

    def draw(batch: int, done: float, generator: torch.Generator) -> Answers:
        return rows(train, torch.randint(len(train) - context, (batch,), generator=generator))

    def measure(model: Model) -> dict[str, Any]:
        starts = torch.arange(0, len(held_out) - context, context)[:windows]
        parts = [rows(held_out, some) for some in starts.split(16)]
        losses = [_loss(model(part.input_ids), part.labels) for part in parts]
        loss = sum(losses) / len(losses)
        return {"loss": float(loss), "bits_per_byte": float(loss) / math.log(2)}

    return Task("text", 1.0, 4, 256, 8, 300, 4e-3, draw, measure)


def _recall_task(vocab_size: int = 64, length: int = 80, pairs: tuple[int, ...] = (4, 8, 16)) -> Task:
    """Few pairs first, all counts in turn after a third of the steps."""

    def draw(batch: int, done: float, generator: torch.Generator) -> Answers:
        allowed = pairs[: 1 + int(3 * len(pairs) * done)]
        count = allowed[int(torch.randint(len(allowed), (1,), generator=generator))]
        return mqar(batch, length, count, vocab_size=vocab_size, generator=generator)

    def measure(model: Model) -> dict[str, Any]:
        by_pairs = {}
        for count in pairs:
            test = mqar(128, length, count, vocab_size=vocab_size, generator=torch.Generator().manual_seed(10**6))
            by_pairs[str(count)] = _accuracy(model(test.input_ids), test.labels)
        return {"accuracy": by_pairs[str(pairs[-1])], "by_pairs": by_pairs}

    return Task("recall", 0.15, 2, vocab_size, 32, 1000, 4e-3, draw, measure)


def _language_task(name: str, longest: int = 40) -> Task:
    """Words of one length a step, short ones first."""
    language = LANGUAGES[name]

    def draw(batch: int, done: float, generator: torch.Generator) -> Answers:
        most = max(4, min(longest, math.ceil(longest * (0.1 + 2 * done))))
        return language(batch, int(torch.randint(3, most + 1, (1,), generator=generator)), generator)

    def measure(model: Model) -> dict[str, Any]:
        test = language(128, max(LENGTHS), torch.Generator().manual_seed(10**6))
        logits = torch.cat([model(ids) for ids in test.input_ids.split(32)])
        by_length = {}
        for length in LENGTHS:
            last = slice(max(0, length - NEAR), length)
            by_length[str(length)] = _accuracy(logits[:, last], test.labels[:, last])
        return {"accuracy": by_length[str(longest)], "accuracy_256": by_length["256"], "by_length": by_length}

    return Task(name, 0.1, 2, 8, 64, 2000, 4e-3, draw, measure)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_ANSWER)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    asked = labels != NO_ANSWER
    return float((logits.argmax(-1) == labels)[asked].float().mean())


def config_of(architecture: str, task: Task, parameters: int) -> RecurrentConfig:
    """The configuration whose model is nearest to so many parameters, by its width alone.

    Raises:
        RnnzooError: so few that the narrowest model has over a half more.
    """
    cls = architecture_config(architecture)

    def config(width: int) -> RecurrentConfig:
        return cls(vocab_size=task.vocab_size, hidden_size=width, num_hidden_layers=task.layers)

    def count(width: int) -> int:
        return parameter_count(config(width))

    low, high = WIDTH_STEP, 2 * WIDTH_STEP
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > WIDTH_STEP:
        middle = (low + high) // 2 // WIDTH_STEP * WIDTH_STEP
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    width = min((low, high), key=lambda width: abs(math.log(count(width) / parameters)))
    if count(width) > 1.5 * parameters:
        raise RnnzooError(f"The narrowest {architecture} has {count(width):,} parameters; give --parameters more.")
    return config(width)


def learn(
    architecture: str,
    task: Task,
    *,
    parameters: int,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> dict[str, Any]:
    """Trains one model on one task.

    Args:
        parameters: of a text model; other tasks have their share of them.
        progress: called as progress(steps done, steps in all, loss) every 20 steps.
    Returns:
        What was done and what came of it; the speed leaves the first three steps out.
    """
    steps = steps or task.steps
    config = config_of(architecture, task, round(parameters * task.share))
    torch.manual_seed(seed)
    model = causal_lm_class(architecture)(config).train()
    optimizer = _optimizer(model, task.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses, tokens = [], 0
    started = clock = time.perf_counter()
    for step in range(steps):
        if step == 3:
            clock, tokens = time.perf_counter(), 0
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate * _schedule(step, steps)
        drawn = task.draw(task.batch, step / steps, generator)
        loss = _loss(model(drawn.input_ids, use_cache=False).logits, drawn.labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        tokens += drawn.input_ids.numel()
        if step % 20 == 0 or step == steps - 1:
            progress(step + 1, steps, losses[-1])
    now = time.perf_counter()
    model.eval()
    with torch.no_grad():
        measured = task.measure(lambda ids: model(ids, use_cache=False).logits)
    return {
        "architecture": architecture,
        "task": task.name,
        "parameters": model.num_parameters(),
        "hidden_size": config.hidden_size,
        "layers": task.layers,
        "steps": steps,
        "seed": seed,
        "asked_parameters": parameters,
        "seconds": round(now - started, 2),
        "seconds_per_step": (now - clock) / max(1, steps - 3),
        "tokens_per_second": tokens / (now - clock),
        "state_bytes": _state_bytes(model),
        "train_loss": [round(statistics.fmean(losses[i : i + 20]), 4) for i in range(0, steps, 20)],
        **measured,
    }


def _schedule(step: int, steps: int) -> float:
    """Up over a twentieth of the steps, down to a tenth of the rate along a cosine."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def _optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; decay for matrices alone, as `rnnzoo train` has it."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (matrices if p.dim() >= 2 and name.endswith("weight") else others).append(p)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


@torch.no_grad()
def _state_bytes(model: Any) -> int:
    """Bytes of the state of one sequence after 256 tokens."""
    cache = RecurrentCache(model.config)
    model(torch.zeros(1, STATE_TOKENS, dtype=torch.long), cache=cache, logits_to_keep=1)
    return sum(state.num_bytes() for state in cache.states if state is not None)
