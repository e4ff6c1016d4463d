"""How long a call takes, and what this machine can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Machine", "measure_machine", "seconds"]


def seconds(
    run: Callable[[], Any], device: str = "cpu", budget: float = 1.0, at_least: int = 3, warm: int = 1
) -> float:
    """Median seconds of a call, after `warm` calls that are not counted (unless the first alone takes ten budgets).

    Args:
        budget: calls are repeated until they took this long in all, or 200 times, and `at_least` so often.
        warm: more than one where a call allocates so much that the first few of them find out where all of it lies.
    """
    started = time.perf_counter()
    run()
    _wait(device)
    first = time.perf_counter() - started
    if first > 10 * budget:
        return first
    for _ in range(warm - 1):
        run()
    times: list[float] = []
    while len(times) < at_least or (sum(times) < budget and len(times) < 200):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class Machine:
    """Measured limits: bytes/s of a copy (read and written bytes both count), FLOP/s of a matrix product."""

    device: str
    threads: int
    copy_bytes: float
    matmul_flops: float
    matmul_flops_bf16: float

    def limit(self, moved: float, flops: float, dtype: torch.dtype) -> float:
        """Seconds that this work takes at least."""
        rate = self.matmul_flops_bf16 if dtype == torch.bfloat16 else self.matmul_flops
        return max(moved / self.copy_bytes, flops / rate)


def measure_machine(device: str = "cpu") -> Machine:
    """The limits, measured now; on a busy machine they are lower, as everything is."""
    source = torch.ones(1 << 26, device=device)  # 256 MiB: no cache holds it
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device)
    rates = {}
    size = 1024 if device == "cpu" else 8192
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        rates[dtype] = 2 * size**3 / seconds(lambda a=a, b=b: a @ b, device)
    return Machine(
        device if device == "cpu" else torch.cuda.get_device_name(),
        torch.get_num_threads(),
        2 * source.nbytes / copy,
        rates[torch.float32],
        rates[torch.bfloat16],
    )
