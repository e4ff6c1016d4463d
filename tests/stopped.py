"""`rnnzoo`, stopped from inside at a named point: no test waits for a moment, and none can come too late for it.

    python stopped.py SIGNAL POINT convert ...          # a file, so that torchrun starts it as well

POINT is one of

    said:STAGE               the stage has said for the first time how far it is
    kept:STAGE:STEP          its checkpoint of this step has just been written
    placed:FILE              a file of this name is whole under another one and about to get its own

SIGNAL is one of Python's names: SIGKILL ends the process without warning, SIGINT is Ctrl-C. Of several processes the
main one gets it, and torchrun ends the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["program", "run_stopped"]


def program(sign: signal.Signals, point: str) -> list[str]:
    """What stands in a command line in the place of `-m rnnzoo`."""
    return [str(Path(__file__)), sign.name, point]


def run_stopped(
    sign: signal.Signals, point: str, arguments: list[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `rnnzoo ARGUMENTS` in a process of its own until it is stopped there."""
    command = [sys.executable, *program(sign, point), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def after(owner: Any, name: str, act: Callable[..., None]) -> None:
    """Lets `act` follow each call of a method, with the same arguments."""
    method = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        done = method(*args, **kwargs)
        act(*args, **kwargs)
        return done

    setattr(owner, name, both)


def arrange(point: str, stop: Callable[[], None]) -> None:
    """Calls `stop` at this point."""
    kind, name, *rest = point.split(":")
    if kind == "said":
        from rnnzoo.cli.progress import ProgressReport

        after(ProgressReport, "__call__", lambda _, stage, *rest, **more: stop() if stage == name else None)
    elif kind == "kept":
        from transformers.trainer_callback import CallbackHandler

        def kept(_: Any, args: Any, state: Any, *rest_: Any) -> None:
            if Path(args.output_dir).name == name and state.global_step == int(rest[0]):
                stop()

        after(CallbackHandler, "on_save", kept)
    elif kind == "placed":
        replace = os.replace

        def place(source: Any, target: Any, **options: Any) -> None:
            if Path(target).name == name:
                stop()
            replace(source, target, **options)

        os.replace = place
    else:
        raise ValueError(f"{point!r} is no point.")


if __name__ == "__main__":
    from rnnzoo import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
    if os.environ.get("RANK", "0") == "0":
        arrange(sys.argv[2], lambda: signal.raise_signal(signal.Signals[sys.argv[1]]))
    sys.exit(cli._run(sys.argv[3:]))
