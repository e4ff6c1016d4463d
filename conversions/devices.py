"""Devices that `plan --devices` knows, by their makers' data sheets.

Peak is of dense bfloat16 matrix products with float32 sums, without structured sparsity. The link is what one device
can send while it receives as much: half of the figure of the data sheet, which counts both directions.
"""

from __future__ import annotations

import dataclasses
import os
import re

from ..kernels.errors import RnnzooError

__all__ = ["CPU", "DEVICES", "Device", "parse_devices"]

# Sustained matmul rate of one core in bfloat16, measured in training on AVX-512 BF16; an estimate anywhere else.
FLOPS_PER_CORE = 50e9
CPU = "cpu"


@dataclasses.dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        flops: peak FLOP/s. memory: bytes. bandwidth: of its memory, bytes/s. link: to the others, bytes/s.
        utilisation: share of the peak that training reaches.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    source: str
    # Published of large models: PaLM 46 % (Chowdhery et al. 2022), Llama 3 on H100 38 to 43 % (Dubey et al. 2024).
    utilisation: float = 0.4


def _device(name: str, tera: float, giga: float, bandwidth: float, link: float, source: str) -> Device:
    return Device(name, tera * 1e12, giga * 1e9, bandwidth * 1e9, link * 1e9, source)


_KNOWN = (
    _device("B200", 2250, 180, 8000, 900, "NVIDIA DGX B200 data sheet"),
    _device("H200", 989, 141, 4800, 450, "NVIDIA H200 data sheet"),
    _device("H100", 989, 80, 3350, 450, "NVIDIA H100 data sheet, SXM"),
    _device("H100-PCIe", 756, 80, 2000, 64, "NVIDIA H100 data sheet, PCIe"),
    _device("A100", 312, 80, 2039, 300, "NVIDIA A100 data sheet, 80 GB SXM"),
    _device("A100-40GB", 312, 40, 1555, 300, "NVIDIA A100 data sheet, 40 GB SXM"),
    _device("L40S", 362, 48, 864, 32, "NVIDIA L40S data sheet"),
    _device("L4", 121, 24, 300, 32, "NVIDIA L4 data sheet"),
    _device("A10", 125, 24, 600, 32, "NVIDIA A10 data sheet"),
    _device("RTX4090", 165, 24, 1008, 32, "NVIDIA Ada GPU architecture white paper"),
    _device("RTX3090", 71, 24, 936, 32, "NVIDIA Ampere GA102 white paper"),
    _device("MI300X", 1307, 192, 5300, 448, "AMD Instinct MI300X data sheet"),
)
DEVICES = {device.name.lower(): device for device in _KNOWN}


def parse_devices(text: str) -> tuple[int, Device]:
    """ "8xH100" -> (8, the H100); "H100" is one; of "cpu" the number is that of cores of one machine, this one.

    Raises:
        RnnzooError: no number, or a device that is not known.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?([\w-]+)\s*", text)
    count = int(match[1] or 1) if match else 0
    if match is None or count < 1:
        raise RnnzooError(f"--devices is {text!r}; write a number and a device, such as 8xH100 or 2xcpu.")
    if match[2].lower() == CPU:
        return count, _cpu()
    if match[2].lower() not in DEVICES:
        names = ", ".join([*(device.name for device in _KNOWN), CPU])
        raise RnnzooError(f"--devices: there are no figures of {match[2]!r}; known are {names}.")
    return count, DEVICES[match[2].lower()]


def _cpu() -> Device:
    """One core of this machine; all share its memory."""
    try:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not POSIX
        memory = 16e9
    source = "measured in training on AVX-512 BF16; memory of this machine"
    return Device(CPU, FLOPS_PER_CORE, memory, 10e9, float("inf"), source, utilisation=1.0)
