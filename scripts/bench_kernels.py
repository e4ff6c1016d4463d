"""The figures of the kernels in docs/results.md: each against what it has to beat, in one run on this machine.

    python scripts/bench_kernels.py --out bench            # the table; peers that are not installed are left out
    python scripts/bench_kernels.py --check                # and exit 1 where a figure is missed
    python scripts/bench_kernels.py --rounds 3             # medians of three rounds, with the least and the most
    python scripts/bench_kernels.py --part steps --only conv  # one part, recurrences with "conv" in their name

Memory that is freed is kept for the next call, for all contestants, as it is in training.
`rnnzoo bench kernels` measures all backends over all lengths instead. Writes OUT/figures.md and OUT/figures.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import click
import torch
from torch.utils import _pytree as pytree

from rnnzoo.benchmarks.cases import CASES, STEP_CASES, Case, scan
from rnnzoo.benchmarks.figures import Figure, median_of_rounds, report
from rnnzoo.benchmarks.peers import DELTA, PEERS, PER_CHANNEL, PER_HEAD
from rnnzoo.benchmarks.sweep import STATES, forward_backward, measure_step
from rnnzoo.benchmarks.timing import Machine, measure_machine, seconds
from rnnzoo.conversions.memory import keep_freed_memory

CPU = "cpu"
SHORT, LONG = 4096, 65_536
WARM = 7  # calls of each length: in the first few the system hands out memory, on a virtual machine at 1 GB/s
# Those whose time is that of memory: the table also says what copies take at both lengths.
MEMORY_BOUND = ("linear_scan", "softmax_scan, RWKV-4", "short_conv, silu")


def chosen_names(parts: tuple[str, ...]) -> set[str]:
    """Of the recurrences that are measured: those with one of `parts` in their name, or all."""
    names = [make().name for make in CASES]
    if unknown := [part for part in parts if not any(part in name for name in names)]:
        raise click.BadParameter(f"no recurrence has {unknown[0]!r} in its name; there are: {'; '.join(names)}.")
    return {name for name in names if not parts or any(part in name for part in parts)}


def chosen(only: set[str], makers: tuple[Callable[..., Case], ...]) -> list[Case]:
    return [case for case in (make() for make in makers) if case.name in only]


def case_named(name: str) -> Case:
    return next(case for case in (make() for make in CASES) if case.name == name)


def timed(
    case: Case, function: Callable[[dict[str, torch.Tensor]], torch.Tensor], steps: int, budget: float, warm: int = 1
) -> float:
    torch.manual_seed(0)
    return seconds(forward_backward(function, case.make(steps)), budget=budget, warm=warm)


def ours(case: Case, steps: int, budget: float, backend: str | None = CPU, warm: int = 1) -> float:
    return timed(case, lambda given: case.call(given, backend), steps, budget, warm)


def against_peers(machine: Machine, budget: float, only: set[str]) -> Iterator[Figure]:
    rows = [
        ("selective_scan", 1024, "transformers Mamba, loop", 200),
        ("selective_scan", 1024, "transformers Mamba with mambapy", 5),
        (PER_HEAD, 4096, "transformers Mamba-2", 4),
        (PER_HEAD, 4096, "SDPA causal attention", 3),
        (PER_HEAD, 16_384, "SDPA causal attention", 8),
        (DELTA, 4096, "transformers Qwen3-Next", 4),
    ]
    for name, steps, other, target in rows:
        if name not in only:
            continue
        case, peer = case_named(name), next(peer for peer in PEERS if peer.name == other)
        if reason := peer.missing(CPU):
            click.echo(f"not measured: {name} against {other}: {reason}", err=True)
            continue
        own = ours(case, steps, budget)
        what = f"{name}, forward and backward, {case.size} T{steps}"
        yield Figure(what, other, timed(case, peer.build(), steps, budget) / own, " x", target)
    if PER_CHANNEL in only:
        case = case_named(PER_CHANNEL)
        ratio = ours(case, 4096, budget, "chunked") / ours(case, 4096, budget)
        yield Figure(f"{PER_CHANNEL}, forward and backward, {case.size} T4096", "chunked", ratio, " x", 2)


def against_the_copy(machine: Machine, budget: float, only: set[str]) -> Iterator[Figure]:
    case = scan(batch=4)
    if case.name in only:
        moved = 7 * 4 * 4096 * 1024 * 4
        share = moved / ours(case, 4096, budget) / machine.copy_bytes
        yield Figure("linear_scan, forward and backward, B4 T4096 D1024", "copy, 7 passes", 100 * share, " %", 60)


def steps(machine: Machine, budget: float, only: set[str]) -> Iterator[Figure]:
    for case in chosen(only, STEP_CASES):
        row = measure_step(case, CPU, machine, CPU, torch.float32, budget)
        share = row.gigabytes_per_second * 1e9 / machine.copy_bytes
        what = f"{case.name}, one step, {STATES} states of {case.size}"
        yield Figure(what, f"copy of the state; possible {possible_share(case):.0f} %", 100 * share, " %", 50)


def possible_share(case: Case) -> float:
    """In %, the state's part of all bytes that a step moves: state, inputs, weights, output."""
    assert case.step is not None
    state = case.state()
    inputs = {name: x[:, 0] if x.ndim >= 3 else x for name, x in case.make(1).items()}
    output = case.step(state, inputs, CPU)
    of_state = 2 * sum(x.nbytes for x in pytree.tree_leaves(state))
    others = sum(x.nbytes for x in pytree.tree_leaves((inputs, output)))
    return 100 * of_state / (of_state + others)


def by_length(machine: Machine, budget: float, only: set[str]) -> Iterator[Figure]:
    for case in chosen(only, CASES):
        found = json.loads(_run([sys.executable, __file__, "--length-of", case.name]))
        yield Figure(f"{case.name}, T{LONG} over T{SHORT}", "linear: 16", found["ratio"], " x", 18, at_most=True)
        if case.name in MEMORY_BOUND:
            yield Figure(f"copies of {case.name}'s inputs, T{LONG} over T{SHORT}", "linear: 16", found["copies"], " x")
            gigabytes = case.moved(LONG, backward=True) / 1e9
            against = f"copy of the {gigabytes:.2f} GB that it moves"
            yield Figure(f"{case.name}, forward and backward, T{LONG}", against, 100 * found["share"], " %")


def memory(machine: Machine, budget: float, only: set[str]) -> Iterator[Figure]:
    for case in chosen(only, CASES):
        share = float(_run([sys.executable, __file__, "--memory-of", case.name]))
        what = f"{case.name}, extra memory, T{LONG}"
        yield Figure(what, "inputs, output, gradients", share, " x", 1.5, at_most=True)


def length_ratio(name: str, budget: float = 1.5) -> dict[str, float]:
    """How much longer the long call takes; the same of copies; and of the long call, the share of the copies' rate.

    In a process of its own: what other calls have left of the heap would count as well.
    """
    keep_freed_memory()
    case = case_named(name)
    times = {length: ours(case, length, budget, warm=WARM) for length in (SHORT, LONG)}
    found = {"ratio": times[LONG] / times[SHORT]}
    if name in MEMORY_BOUND:
        rates = {length: copy_rate(case, length, budget) for length in (SHORT, LONG)}
        found["copies"] = LONG / SHORT * rates[SHORT] / rates[LONG]
        found["share"] = case.moved(LONG, backward=True) / rates[LONG] / times[LONG]
    return found


def copy_rate(case: Case, length: int, budget: float) -> float:
    """Bytes/s, read and written, of copies of the inputs with an axis of time."""
    inputs = [x for x in case.make(length).values() if x.ndim >= 3]
    targets = [torch.empty_like(x) for x in inputs]

    def copy() -> None:
        for source, target in zip(inputs, targets, strict=True):
            target.copy_(source)

    return 2 * sum(x.nbytes for x in inputs) / seconds(copy, budget=budget, warm=WARM)


def extra_memory(name: str, length: int = LONG) -> float:
    """Memory that forward and backward need at most beside the inputs, over inputs, output and gradients together."""
    case = case_named(name)
    forward_backward(lambda given: case.call(given, CPU), case.make(128))()  # libraries and threads are loaded
    inputs = case.make(length)
    learns = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = _status("VmRSS")
    output = case.call(inputs, CPU)
    weights = torch.ones_like(output)
    gradients = torch.autograd.grad(output, learns, weights, allow_unused=True)  # a teacher's inputs have none
    held = sum(x.nbytes for x in (*inputs.values(), output, weights, *gradients) if x is not None)
    return (_status("VmHWM") - before) / held


def _status(name: str) -> int:
    """Bytes of this process, as Linux counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def first_use(machine: Machine, budget: float, only: set[str]) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        command = "import time, torch; from rnnzoo.kernels.native import build_all; s = time.time(); build_all(); "
        command += "print(time.time() - s)"
        done = _run([sys.executable, "-c", command], RNNZOO_CACHE=folder, RNNZOO_NO_REGISTER="1")
    yield Figure("first use: all C files are compiled", "", float(done), " s", 20, at_most=True)


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip().splitlines()[-1]


PARTS: dict[str, Callable[[Machine, float, set[str]], Iterator[Figure]]] = {
    "peers": against_peers,
    "copy": against_the_copy,
    "steps": steps,
    "lengths": by_length,
    "memory": memory,
    "first-use": first_use,
}


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for figures.md and figures.json.")
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="May be repeated.  [default: all]")
@click.option("--only", multiple=True, metavar="TEXT", help="Only recurrences with this in their name; repeatable.")
@click.option(
    *("--seconds", "budget"),
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="Time for each number.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Of all measurements.")
@click.option("--check", is_flag=True, help="Exit 1 where a figure is missed.")
@click.option("--memory-of", hidden=True)
@click.option("--length-of", hidden=True)
def main(out, parts, only, budget, rounds, check, memory_of, length_of) -> None:
    """Measure, and write the table."""
    if memory_of is not None:
        click.echo(extra_memory(memory_of))
        return
    if length_of is not None:
        click.echo(json.dumps(length_ratio(length_of)))
        return
    started, names = time.monotonic(), chosen_names(only)
    keep_freed_memory()  # as in a conversion: else the time is that of the system, which zeroes fresh memory
    tables: list[list[Figure]] = []
    for _ in range(rounds):
        machine = measure_machine()
        tables.append([])
        for part in parts or PARTS:
            for figure in PARTS[part](machine, budget, names):
                tables[-1].append(figure)
                click.echo(figure.line())
    figures = median_of_rounds(tables)
    limits = f"copies {machine.copy_bytes / 1e9:.1f} GB/s, matrix products {machine.matmul_flops / 1e9:.0f} GFLOP/s"
    text = report(figures, f"{machine.threads} threads, float32: {limits}.", out, machine=asdict(machine))
    click.echo(f"\n{text}\n{time.monotonic() - started:.0f} s")
    if check and not all(figure.met for figure in figures):
        sys.exit(1)


if __name__ == "__main__":
    main()
