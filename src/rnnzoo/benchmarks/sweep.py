"""Every recurrence on every backend, and its peers, over lengths: forward, forward and backward, one step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels.dispatch import backends
from ..kernels.files import replace_text
from .cases import CASES, STEP_CASES, Case
from .peers import PEERS
from .timing import Machine, seconds

__all__ = ["MODES", "Row", "forward_backward", "measure_step", "plot", "sweep", "write_rows"]

MODES = ("forward", "forward+backward", "step")
LONGEST_LOOP = 1024  # steps of a peer that is a Python loop
STATES = 30  # a step is measured over the states of so many layers in turn, as decoding does
Report = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One measurement. `share` is the machine's limit for this work over the time taken; None for peers' steps."""

    case: str
    size: str
    what: str
    mode: str
    time: int
    dtype: str
    seconds: float
    gigabytes_per_second: float
    gflops: float
    share: float


def forward_backward(function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """A call that runs `function` and the gradients of all floating inputs, ready for the clock."""
    inputs = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    weights = torch.randn_like(function(inputs).detach())
    leaves = [x for x in inputs.values() if x.requires_grad]

    def run() -> Any:
        return torch.autograd.grad(function(inputs), leaves, weights, allow_unused=True)

    return run


def sweep(
    machine: Machine,
    lengths: list[int],
    modes: list[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    only: list[str] | None = None,
    budget: float = 1.0,
    longest_call: float = 20.0,
    report: Report = lambda text: None,
) -> Iterator[Row]:
    """Measures, row by row.

    Args:
        only: names of operations; None: all. budget: seconds that a row's calls take in all (`timing.seconds`).
        longest_call: a length is left out where the length before it lets expect a call of more seconds.
        report: told what is left out, and why.
    """
    for make, make_step in zip_longest(CASES, STEP_CASES):
        case = make()
        if only is not None and case.operation not in only:
            continue
        contestants = dict(_contestants(case, device, report))
        for mode in modes:
            if mode == "step":
                decoding = None if make_step is None else make_step()
                if decoding is None:
                    continue
                for status in backends(f"{case.operation}_step"):
                    if status.reason is None and status.backend != "reference":
                        yield measure_step(decoding, status.backend, machine, device, dtype, budget)
                continue
            for name, (function, longest) in contestants.items():
                expected = 0.0
                for time in lengths:
                    if time > longest or expected > longest_call:
                        report(f"{case.name}, {name}, {mode}: not at {time:,} steps (it takes too long)")
                        break
                    taken = _measure(case, function, mode, time, device, dtype, budget)
                    expected = 4 * taken
                    yield _row(case, name, mode, time, dtype, taken, machine)


def _contestants(case: Case, device: str, report: Report) -> Iterator[tuple[str, tuple[Callable[..., Tensor], int]]]:
    for status in backends(case.operation):
        if status.reason is not None:
            report(f"{case.name}: no {status.backend} ({status.reason})")
        elif status.backend == "triton" and device == "cpu":
            report(f"{case.name}: no triton (on the CPU it is only interpreted)")
        else:
            longest = LONGEST_LOOP if status.backend == "reference" else 1 << 30
            yield status.backend, (lambda given, name=status.backend: case.call(given, name), longest)
    for peer in PEERS:
        if peer.case != case.name:
            continue
        reason = peer.missing(device)
        function = None
        try:
            function = peer.build() if reason is None else None
        except (ImportError, RuntimeError, AttributeError) as error:  # of another version, or made for a GPU
            reason = f"{type(error).__name__}: {error}"
        if function is None:
            report(f"{case.name}: no {peer.name} ({reason})")
        else:
            yield peer.name, (function, LONGEST_LOOP if peer.sequential else 1 << 30)


def _measure(
    case: Case,
    function: Callable[[dict[str, Tensor]], Tensor],
    mode: str,
    time: int,
    device: str,
    dtype: torch.dtype,
    budget: float,
) -> float:
    torch.manual_seed(0)
    inputs = {name: _placed(x, device, dtype) for name, x in case.make(time).items()}
    if mode == "forward":
        with torch.no_grad():
            return seconds(lambda: function(inputs), device, budget)
    return seconds(forward_backward(function, inputs), device, budget)


def _placed(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype if x.is_floating_point() else None)


def measure_step(case: Case, backend: str, machine: Machine, device: str, dtype: torch.dtype, budget: float) -> Row:
    """Decoding: one step on each layer's state in turn; bytes are those of the state, read and written."""
    states = [pytree.tree_map(lambda x: x.to(device), case.state()) for _ in range(STATES)]
    inputs = {name: _placed(x, device, dtype) for name, x in case.make(1).items()}
    # Inputs without their axis of time; weights stay as they are.
    inputs = {name: x[:, 0] if x.ndim >= 3 else x for name, x in inputs.items()}
    assert case.step is not None
    step = case.step

    def run() -> None:
        for state in states:
            step(state, inputs, backend)

    with torch.no_grad():
        taken = seconds(run, device, budget) / STATES
    moved = 2 * sum(x.nbytes for x in pytree.tree_leaves(states[0]))
    return _row(case, backend, "step", 1, dtype, taken, machine, moved)


def _row(
    case: Case,
    what: str,
    mode: str,
    time: int,
    dtype: torch.dtype,
    taken: float,
    machine: Machine,
    moved: int | None = None,
) -> Row:
    backward = mode == "forward+backward"
    size = torch.finfo(dtype).bits / 32
    moved = moved if moved is not None else int(case.moved(time, backward) * size)
    flops = case.flops * time * (3 if backward else 1)
    return Row(
        case.name,
        case.size,
        what,
        mode,
        time,
        str(dtype).removeprefix("torch."),
        taken,
        moved / taken / 1e9,
        flops / taken / 1e9,
        machine.limit(moved, flops, torch.float32) / taken,
    )


def write_rows(path: Path, machine: Machine, rows: list[Row]) -> None:
    """The measurements as JSON, in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"machine": asdict(machine), "rows": [asdict(row) for row in rows]}, indent=1))


def plot(path: Path, rows: list[Row], mode: str = "forward+backward") -> None:
    """Seconds over length, both logarithmic, a panel for each recurrence."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.mode == mode]
    names = list(dict.fromkeys(row.case for row in rows))
    if not names:
        return
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    markers = "osv^Dx+*"
    for axes, name in zip(panels, names, strict=False):
        own = [row for row in rows if row.case == name]
        for number, what in enumerate(dict.fromkeys(row.what for row in own)):
            points = [(row.time, row.seconds) for row in own if row.what == what]
            axes.plot(*zip(*points, strict=True), marker=markers[number % len(markers)], markersize=4, label=what)
        axes.set(xscale="log", yscale="log", title=f"{name}\n{own[0].size}", xlabel="steps", ylabel=f"seconds, {mode}")
        axes.xaxis.set_major_locator(_powers(own))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_locator(_powers([]))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in list(panels)[len(names) :]:
        axes.set_axis_off()
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _powers(rows: list[Row]) -> Any:
    from matplotlib.ticker import FixedLocator

    lengths = sorted({row.time for row in rows})
    return FixedLocator(lengths[:: max(1, len(lengths) // 4)])
