"""What the Triton backends share: whether they can run here, and block sizes that were measured once.

Kernels are imported only where Triton is; with TRITON_INTERPRET=1 they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cache import build_folder, cache_root
from .files import object_or_nothing
from .operators import unfit

__all__ = ["interpreted", "priority", "problem", "supports", "tuned"]


def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def problem() -> str | None:
    """Why Triton kernels cannot run on this machine; None where they can."""
    return _problem()


@functools.cache
def _problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'rnnzoo[gpu]')"
    if not interpreted() and not torch.cuda.is_available():
        return "no GPU was found"
    return None


def supports(call: dict[str, Any], dtypes: Sequence[torch.dtype] = ()) -> str | None:
    """Why these arguments are not for Triton, as a backend's `supports` tells it; None where they are.

    Args:
        call: by name; what is no tensor is passed over.
        dtypes: of floating tensors; () is float32, bfloat16 and float16.
    """
    allowed = tuple(dtypes) or (torch.float32, torch.bfloat16, torch.float16)
    return unfit(call, lambda tensor: tensor.device.type == "cuda" or interpreted(), allowed)


def tuned(
    kernel: str,
    key: tuple[Any, ...],
    rule: dict[str, int],
    candidates: Sequence[dict[str, int]] = (),
    run: Callable[[dict[str, int]], Any] | None = None,
) -> dict[str, int]:
    """Block sizes of a kernel launch: what was measured on this GPU, or else `rule`.

    With RNNZOO_AUTOTUNE=1 the candidates are timed once for each kernel, GPU and key, and the best is kept on disk.

    Args:
        key: what the best choice depends on (widths, dtype), and never the sequence length or the batch size.
        run: launches the kernel with the sizes it is given.
    """
    if interpreted() or not torch.cuda.is_available():
        return rule
    device = torch.cuda.get_device_name()
    name = " ".join(map(str, (kernel, *key)))
    known = _read(device)
    if name in known:
        return known[name]
    if run is None or not candidates or os.environ.get("RNNZOO_AUTOTUNE") != "1":
        return rule
    best = min((rule, *candidates), key=lambda sizes: _milliseconds(run, sizes))
    _write(device, {**_read(device, fresh=True), name: best})
    return best


def _path(device: str) -> Any:
    return cache_root() / "kernels" / f"tuning-{re.sub(r'[^A-Za-z0-9]+', '-', device)}.json"


_known: dict[str, dict[str, dict[str, int]]] = {}


def _read(device: str, fresh: bool = False) -> dict[str, dict[str, int]]:
    if fresh or device not in _known:
        _known[device] = object_or_nothing(_path(device))  # none yet, or unreadable: measured again
    return _known[device]


def _write(device: str, table: dict[str, dict[str, int]]) -> None:
    path = _path(device)
    path = build_folder(path.parent) / path.name
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(table, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
    _known[device] = table


def _milliseconds(run: Callable[[dict[str, int]], Any], sizes: dict[str, int]) -> float:
    """Median of ten launches; infinite where these sizes do not fit the GPU."""
    try:
        run(sizes)
        times = []
        for _ in range(10):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(sizes)
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        return sorted(times)[len(times) // 2]
    except Exception as error:  # Triton's OutOfResources, whose module moves between versions
        if "out of resource" in str(error).lower():
            return float("inf")
        raise


def priority() -> int:
    """Of a Triton backend: before all others with a GPU; without one, only where it is asked for by name."""
    return 30 if torch.cuda.is_available() else -10
