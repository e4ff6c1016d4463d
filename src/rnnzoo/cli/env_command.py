"""`rnnzoo env`: what a bug report should hold."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import click

from ..kernels.errors import RnnzooError
from .kernel_backends import kernel_backends
from .output import Output, output_options
from .quantities import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = """
    rnnzoo torch transformers accelerate huggingface-hub safetensors tokenizers gguf datasets peft trl lm-eval
    matplotlib triton""".split()
VARIABLES = """
    RNNZOO_BACKEND RNNZOO_CACHE RNNZOO_DEBUG RNNZOO_NO_REGISTER HF_HOME HF_HUB_OFFLINE HF_ENDPOINT
    OMP_NUM_THREADS CUDA_VISIBLE_DEVICES""".split()


@click.command("env")
@click.option(
    "--kernels", "only_kernels", is_flag=True, help="Compile all kernels now; show every backend, or why not."
)
@output_options
def command(output: Output, only_kernels: bool) -> None:
    """Show versions, compiler, devices, and which kernels run here."""
    if only_kernels:
        from ..kernels.native import build_all

        build_all()
        found = kernel_backends()
        output.result({"kernels": found}, lambda console: _show_kernels(found, console))
        return
    value = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "compiler": _compiler(),
        "devices": _devices(),
        "memory_bytes": _memory(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "kernels": kernel_backends(),
    }
    output.result(value, lambda console: _show(value, console))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """First line of `cc --version`, of the one that the kernels would use."""
    from ..kernels.native import compiler

    path = compiler()
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return f"{path}: {done.stdout.splitlines()[0]}" if done.returncode == 0 and done.stdout else path


def _devices() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads", "gpus": gpus}


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _show(value: dict[str, Any], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)

    def row(name: str, words: str) -> None:
        table.add_row(Text(name, style="bold"), Text(words))

    row("python", f"{value['python']} on {value['platform']}")
    for name, version in value["packages"].items():
        row(name, version or "not installed")
    row("compiler", value["compiler"] or "none found")
    row("cpu", value["devices"]["cpu"])
    row("gpu", ", ".join(value["devices"]["gpus"]) or "none")
    row("memory", format_bytes(value["memory_bytes"]) if value["memory_bytes"] else "unknown")
    for name, setting in value["variables"].items():
        row(name, setting)
    console.print(table)
    console.print()
    _show_serving(value["kernels"], console)


def _asked() -> tuple[str | None, str | None]:
    """The backend that RNNZOO_BACKEND asks for, and what is wrong with it: calls of kernels will say the same."""
    from ..kernels.dispatch import chosen_backend

    try:
        return chosen_backend(), None
    except RnnzooError as error:
        return None, str(error)


def _serving(backends: list[dict[str, Any]], asked: str | None) -> str | None:
    """The backend that serves an operation's usual calls here."""
    available = [entry["backend"] for entry in backends if entry["available"]]
    return asked if asked in available else next(iter(available), None)


def _show_serving(kernels: dict[str, Any], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    asked, problem = _asked()
    words = f"where it can serve, {asked} (RNNZOO_BACKEND)" if asked else "the fastest that is available"
    console.print(Text(f"kernels: {problem or words}", style="bold"))
    table = Table(show_header=False, box=None, pad_edge=False)
    for operation, backends in kernels.items():
        table.add_row(Text(f"  {operation}"), Text(_serving(backends, asked) or "none"))
    console.print(table)


def _show_kernels(kernels: dict[str, Any], console: Console) -> None:
    from rich.text import Text

    asked, problem = _asked()
    for operation, backends in kernels.items():
        console.print(Text(operation, style="bold"))
        serving = _serving(backends, asked)
        for entry in backends:
            words = "chosen by RNNZOO_BACKEND" if entry["backend"] == asked else "first choice"
            state = entry["reason"] or (words if entry["backend"] == serving else "available")
            console.print(Text(f"  {entry['backend']}: {state}"))
        if asked and serving != asked:
            console.print(Text(f"  RNNZOO_BACKEND asks for {asked!r}, which cannot run here: {serving} serves instead"))
    if problem:
        console.print(Text(problem))
