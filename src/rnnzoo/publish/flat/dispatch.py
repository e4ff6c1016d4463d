"""How a kernel is called. Stands for `kernels/dispatch.py`, where a choice between all backends is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .compiled import COMPILED, in_c


def run(operation: str, kernel: Callable[..., Any], **call: Any) -> Any:
    """Autocast is off inside: each kernel says in which dtype it computes (states in float32), and keeps to it."""
    if operation in COMPILED:
        kernel, call = in_c(operation, kernel, call)
    device = next((x.device.type for x in call.values() if isinstance(x, torch.Tensor)), "cpu")
    if not torch.is_autocast_enabled(device):
        return kernel(**call)
    with torch.autocast(device, enabled=False):
        return kernel(**call)
