"""Does every architecture learn? Text, recall and three regular languages, at equal parameters and equal steps.

    python scripts/train_zoo.py --text tinyshakespeare.txt --out learning               # all: some hours on two cores
    python scripts/train_zoo.py --text ... --out learning --arch mamba2 --task recall   # a part of it

Each result is a file OUT/<architecture>-<task>.json, written when it is finished; what is there with the same settings
is not done again, so that a stopped sweep goes on, and parts add up. At the end OUT/zoo.md and OUT/zoo.png show all
that is in OUT. On one machine run one process at a time: two would spoil each other's tokens/s.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click
import torch

from rnnzoo.benchmarks.learning import TASKS, config_of, learn, make_task
from rnnzoo.benchmarks.learning_report import draw, table
from rnnzoo.cli.quantities import COUNT
from rnnzoo.conversions.memory import keep_freed_memory
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.kernels.files import object_or_nothing, replace_text
from rnnzoo.zoo.core.registry import architectures


def finished(path: Path, asked: dict[str, Any]) -> bool:
    """Whether the file holds a result for just these settings."""
    record = object_or_nothing(path)
    return bool(record) and all(record.get(name) == value for name, value in asked.items())


def show(out: Path) -> None:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*-*.json"))]
    words = table(records)
    replace_text(out / "zoo.md", words)
    click.echo(words)
    try:
        draw(records, out / "zoo.png")
    except ImportError:
        click.echo("no plot: matplotlib is not installed (pip install 'rnnzoo[plots]')", err=True)


@click.command()
@click.option("--out", default="learning", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--text", type=click.Path(exists=True, dir_okay=False), help="File of the task text, read as bytes.")
@click.option("--arch", "names", multiple=True, help="Architecture; repeatable. Default: all.")
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="Repeatable. Default: all.")
@click.option("--parameters", type=COUNT, default=1_000_000, show_default=True, help="Of a text model.")
@click.option("--steps", type=click.IntRange(min=1), help="Of every task. Default: the task's own.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Default: those of PyTorch.")
@click.option("--report", is_flag=True, help="Only table and plot of what is in OUT.")
def main(out, text, names, tasks, parameters, steps, seed, threads, report) -> None:
    """Train every architecture on every task; see the head of the file."""
    out.mkdir(parents=True, exist_ok=True)
    if report:
        show(out)
        return
    if unknown := sorted(set(names) - set(architectures())):
        raise click.UsageError(f"{unknown[0]!r} is no architecture; known are {', '.join(architectures())}.")
    torch.set_num_threads(threads or torch.get_num_threads())
    keep_freed_memory()
    failed = []
    for task_name in tasks or TASKS:
        try:
            task = make_task(task_name, text)
        except RnnzooError as error:
            raise click.UsageError(str(error)) from error
        for name in names or architectures():
            path = out / f"{name}-{task_name}.json"
            asked = {"steps": steps or task.steps, "seed": seed, "asked_parameters": parameters}
            asked |= {"architecture": name, "task": task_name, "threads": torch.get_num_threads()}
            if finished(path, asked):
                continue
            try:
                record = train_one(name, task, parameters, steps, seed)
            except Exception as error:  # one that fails must not stop the sweep
                failed.append(f"{name} on {task_name}: {type(error).__name__}: {error}")
                click.echo(failed[-1], err=True)
                continue
            replace_text(path, json.dumps(asked | record, indent=1) + "\n")
    show(out)
    if failed:
        raise click.ClickException("; ".join(failed))


def train_one(name: str, task: Any, parameters: int, steps: int | None, seed: int) -> dict[str, Any]:
    config = config_of(name, task, round(parameters * task.share))
    started = spoken = time.monotonic()

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal spoken
        now = time.monotonic()
        if done == total or now - spoken > 15:
            spoken = now
            click.echo(f"{name}, {task.name}: {done}/{total}, loss {loss:.3f}, {now - started:.0f} s", err=True)

    click.echo(f"{name}, {task.name}: width {config.hidden_size}", err=True)
    return learn(name, task, parameters=parameters, steps=steps, seed=seed, progress=progress)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
