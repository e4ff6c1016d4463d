"""`rnnzoo bench kernels`: our kernels next to other installed packages, in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..kernels.errors import RnnzooError
from .output import Output, output_options
from .quantities import COUNT, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

MODES = ("forward", "forward+backward", "step")
LENGTHS = (512, 2048, 8192, 32_768, 65_536)


@click.group("bench")
def command() -> None:
    """Measure speed on this machine, next to other installed packages."""


@command.command("kernels")
@click.option("--operation", "only", multiple=True, metavar="NAME", help="Only this recurrence (may be repeated).")
@click.option(
    *("--length", "lengths"),
    multiple=True,
    type=COUNT,
    help=f"Steps, may be repeated.  [default: {', '.join(map(str, LENGTHS))}]",
)
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="May be repeated.  [default: all]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option(
    *("--seconds", "budget"),
    type=click.FloatRange(min=0, min_open=True),
    default=0.5,
    show_default=True,
    help="Time spent on each measurement.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for kernels.json and kernels.png."
)
@output_options
def kernels(
    output: Output,
    only: tuple[str, ...],
    lengths: tuple[int, ...],
    modes: tuple[str, ...],
    device: str,
    dtype: str,
    budget: float,
    out: Path | None,
) -> None:
    """Time every recurrence on every backend and the peers that are installed.

    Prints the time, over that of the fastest, GB/s, GFLOP/s, and which share of this machine's measured limit (copy
    bandwidth, matrix products) was reached; what runs from the caches can be above it. Memory that is freed is kept for
    the next call. A step is one token of decoding, on the states of 30 layers in turn.
    """
    import torch

    from ..benchmarks.cases import CASES
    from ..benchmarks.sweep import plot, sweep, write_rows
    from ..benchmarks.timing import measure_machine
    from ..conversions.memory import keep_freed_memory

    known = sorted({make().operation for make in CASES})
    if unknown := [name for name in only if name not in known]:
        raise RnnzooError(f"--operation {unknown[0]!r} is no recurrence; known are {', '.join(known)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise RnnzooError("--device cuda: no GPU was found; leave it out to measure the CPU.")
    if out is not None:
        try:  # now: a measurement takes minutes
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RnnzooError(f"--out {out}: the folder cannot be made ({error.strerror}); name another.") from error
    keep_freed_memory()  # for all contestants: training calls the same again and again
    output.note("measuring the machine's limits")
    machine = measure_machine(device)
    rows = []
    for row in sweep(
        machine,
        sorted(lengths) or list(LENGTHS),
        list(modes) or list(MODES),
        device=device,
        dtype=getattr(torch, dtype),
        only=list(only) or None,
        budget=budget,
        report=output.note,
    ):
        rows.append(row)
        output.note(f"{row.case} | {row.what} | {row.mode} | {_steps(row.time)}: {_time(row.seconds)}")
        if out is not None:
            write_rows(out / "kernels.json", machine, rows)
    if out is not None:
        try:
            plot(out / "kernels.png", rows)
        except ImportError:
            output.note("no plot: matplotlib is not installed (pip install 'rnnzoo[plots]')")
    output.result({"machine": machine, "rows": rows}, lambda console: _show(machine, rows, console))


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _time(seconds: float) -> str:
    for unit, size in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * size:
            return f"{seconds / size:.3g} {unit}"
    return format_seconds(seconds) if seconds >= 60 else f"{seconds:.3g} s"


def _show(machine: Any, rows: list[Any], console: Console) -> None:
    from rich.table import Table

    console.print(
        f"{machine.device}, {machine.threads} threads: copies {machine.copy_bytes / 1e9:.1f} GB/s, matrix products "
        f"{machine.matmul_flops / 1e9:.0f} GFLOP/s in float32, {machine.matmul_flops_bf16 / 1e9:.0f} in bfloat16"
    )
    for case, mode in dict.fromkeys((row.case, row.mode) for row in rows):
        own = [row for row in rows if (row.case, row.mode) == (case, mode)]
        table = Table(title=f"{case} ({own[0].size}), {mode}", title_justify="left")
        for column in ("steps", "what", "time", "against the fastest", "GB/s", "GFLOP/s", "of the limit"):
            table.add_column(column, justify="left" if column == "what" else "right")
        for time in dict.fromkeys(row.time for row in own):
            at = sorted((row for row in own if row.time == time), key=lambda row: row.seconds)
            for row in at:
                table.add_row(
                    f"{time:,}",
                    row.what,
                    _time(row.seconds),
                    f"{row.seconds / at[0].seconds:.2f} x",
                    f"{row.gigabytes_per_second:.2f}",
                    f"{row.gflops:.2f}",
                    f"{row.share:.0%}",
                )
        console.print(table)
