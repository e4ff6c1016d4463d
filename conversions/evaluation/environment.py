"""Where and with what a measurement is made: versions, processor, backend."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ...kernels.dispatch import chosen_backend

__all__ = ["QUALITY", "SPEED", "conditions", "device_name", "environment"]

# What a measured quality depends on besides models, data and settings, and what a measured speed does.
QUALITY = ("rnnzoo", "backend")
SPEED = (*QUALITY, "torch", "transformers", "device")


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware of this process."""
    names = ("rnnzoo", "torch", "transformers", "tokenizers", "safetensors", "lm-eval")
    found = {name: _version(name) for name in names}
    return {
        "python": platform.python_version(),
        **{name: value for name, value in found.items() if value},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device_name(device),
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "backend": chosen_backend() or "automatic",
    }


def conditions(environment: dict[str, str], names: tuple[str, ...]) -> dict[str, str | None]:
    """QUALITY or SPEED of an environment; one from before backends were written down had the automatic one."""
    return {name: environment.get(name, "automatic" if name == "backend" else None) for name in names}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return None


def device_name(device: torch.device) -> str:
    """The processor's own name, with the threads in use on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name[ \t]*:[ \t]*(.*\S)", cpuinfo.read_text(), re.MULTILINE)
        name = named[1] if named else name
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"
