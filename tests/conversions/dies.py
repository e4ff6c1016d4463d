"""`rnnzoo`, killed without warning as soon as a stage has come so far; started by tests, also by torchrun.

    python dies.py STAGE STEP convert ...

STEP is that of the checkpoint which has just been written, 0: the stage keeps none, and has just said how far it is.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from rnnzoo import cli
from rnnzoo.conversions import job
from rnnzoo.conversions.stages import training


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    stage, step = sys.argv[1], int(sys.argv[2])
    run_stage, on_save = job.run_stage, training.Report.on_save

    def run_until(job: Any, what: Any, student: Any, part: Any) -> Any:
        if part.name == stage and step == 0:
            job.progress = die
        return run_stage(job, what, student, part)

    def save_and_die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_save(self, args, state, control, **kwargs)
        if self.folder.name == stage and state.global_step == step:
            die()

    job.run_stage = run_until
    setattr(training.Report, "on_save", save_and_die)  # noqa: B010  (pyright knows no methods of this shape)
    sys.exit(cli._run(sys.argv[3:]))
