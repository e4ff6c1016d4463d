"""Progress of long runs on stderr: a bar with tokens/s and time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from .quantities import format_count, format_seconds

__all__ = ["ProgressReport"]

LOG_EVERY_SECONDS = 30.0


class ProgressReport:
    """Called by a run as `progress(stage, done_tokens, total_tokens, info)`; a context manager around the run.

    `info` holds what else is worth a word, such as {"loss": 2.31}. A stage that goes on from a checkpoint starts with
    done_tokens > 0: the speed is that of this run only.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bars: Any = None
        self.tasks: dict[str, Any] = {}
        self.started: dict[str, tuple[float, int]] = {}
        self.logged = 0.0

    def __enter__(self) -> ProgressReport:
        if not self.quiet and sys.stderr.isatty():
            self.bars = _bars()
            self.bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def __call__(self, stage: str, done_tokens: int, total_tokens: int, info: dict[str, Any] | None = None) -> None:
        if self.quiet:
            return
        first = stage not in self.started
        if first:
            self.started[stage] = (time.monotonic(), done_tokens)
        words = _words(info or {})
        if self.bars is not None:
            if first:
                self.tasks[stage] = self.bars.add_task(stage, total=total_tokens, completed=done_tokens, words=words)
            self.bars.update(self.tasks[stage], total=total_tokens, completed=done_tokens, words=words)
        elif first or done_tokens >= total_tokens or time.monotonic() - self.logged >= LOG_EVERY_SECONDS:
            self.logged = time.monotonic()
            print(self._line(stage, done_tokens, total_tokens, words), file=sys.stderr, flush=True)

    def _line(self, stage: str, done: int, total: int, words: str) -> str:
        started, start = self.started[stage]
        seconds = time.monotonic() - started
        parts = [f"{stage}: {format_count(done)} of {format_count(total)}"]
        if done > start and seconds > 0:
            speed = (done - start) / seconds
            parts.append(f"{format_count(round(speed, 1))}/s")
            parts.append(
                f"{format_seconds(round((total - done) / speed))} left"
                if done < total
                else format_seconds(round(seconds))
            )
        return ", ".join([*parts, *([words] if words else [])])


def _words(info: dict[str, Any]) -> str:
    return " ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in info.items()
    )


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Tokens(ProgressColumn):
        """Done, total and tokens/s."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            counts = f"{format_count(task.completed)}/{format_count(task.total or 0)}"
            return Text(counts + (f" {format_count(round(speed, 1))}/s" if speed else ""))

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        Tokens(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[words]}"),
        console=Console(stderr=True),
        speed_estimate_period=120.0,
    )
