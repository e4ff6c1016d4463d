"""The C backends: one `cpu.c` a folder, compiled by the system's compiler when first used and loaded by ctypes.

Nothing is built at installation and no torch header is read, so one build serves every torch version. Builds are kept
in a cache, whose key is the source, the flags, the compiler and the processor; each is written under a temporary name
and renamed, and a lock file lets several processes that start at once wait for one compiler run. Where there is no
compiler, or it fails, the backend says so (`problem`), once in the log, and the next backend serves.

The library uses torch's own OpenMP threads: it is linked with the OpenMP runtime that torch has loaded, because two
runtimes in one process would each keep threads spinning on the same cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .cache import build_folder, cache_root
from .operators import unfit
from .sources import c_sources

__all__ = [
    "build_all",
    "cache_folder",
    "calls",
    "compiler",
    "function",
    "pointer",
    "problem",
    "supports",
    "supports_step",
]

log = logging.getLogger("rnnzoo.kernels")
FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"),
)
# The first that the compiler accepts: this machine's whole instruction set, as x86 or as ARM spells it, or the base.
MACHINE_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class _Calls(threading.local):
    """Of a thread. listener: told of every call of C, the function and its arguments (`kernels/tape`)."""

    listener: Callable[[Callable[..., None], tuple[int | float | None, ...]], None] | None = None


calls = _Calls()
_libraries: dict[str, ctypes.CDLL] = {}
_problems: dict[str, str | None] = {}
_lock = threading.RLock()


def cache_folder() -> pathlib.Path:
    """Where builds are kept, if it can be written (`cache.build_folder`)."""
    return cache_root() / "kernels"


@functools.cache
def compiler() -> str | None:
    """Path of the C compiler: what $CC names, else cc, gcc or clang of the PATH; None without one."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    return None


@torch.compiler.assume_constant_result
def problem(folder: str, build: bool = True) -> str | None:
    """Why the C code of `kernels/<folder>` cannot run here; None where it can.

    Args:
        build: compile now if that was not done yet; False: answer from what is known without the compiler.
    """
    if folder not in _problems:
        if compiler() is None:
            _problems[folder] = "no C compiler found (install gcc or clang, or name one with CC)"
            _say_without_compiler(_problems[folder])
        elif build:
            with _lock:
                if folder not in _problems:
                    _problems[folder] = _load(folder)
    return _problems.get(folder)


@functools.cache
def _say_without_compiler(reason: str) -> None:
    log.warning("%s: slower kernels serve instead of those in C", reason)


def supports(folder: str, call: dict[str, Any]) -> str | None:
    """Why these arguments are not for the C code of a folder, as a backend's `supports` tells it; None where they are.

    Tensors on the CPU are, in float32, bfloat16 or complex64, or of integers; what is no tensor is passed over.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.complex64)
    return unfit(call, lambda tensor: tensor.device.type == "cpu", dtypes) or problem(folder)


def supports_step(
    folder: str, call: dict[str, Any], *state: Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> str | None:
    """`supports` for code that changes a state in place: its tensors are contiguous, in one of `dtypes`."""
    if not all(part.dtype in dtypes and part.is_contiguous() for part in state):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the state is not contiguous in {names}"
    return supports(folder, {**call, "state": state})


@functools.cache
def function(folder: str, name: str, signature: str) -> Callable[..., None]:
    """The C function `name` of `kernels/<folder>/cpu.c`, which returns nothing.

    Args:
        signature: one letter an argument: p pointer (`pointer(tensor)`), i int64, f float.
    """
    reason = problem(folder)
    if reason is not None:
        raise RuntimeError(f"kernels/{folder}/cpu.c: {reason}")
    entry = getattr(_libraries[folder], name)
    entry.argtypes, entry.restype = [TYPES[letter] for letter in signature], None

    def call(*arguments: int | float | None) -> None:
        entry(*arguments)
        if calls.listener is not None:
            calls.listener(entry, arguments)

    return call


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's first element; None, which C sees as NULL, for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "C code reads contiguous tensors"
    return tensor.data_ptr()


def build_all() -> dict[str, str | None]:
    """Compiles every folder's C code on all cores; folder -> why it failed, or None."""
    folders = sorted(name.partition("/")[0] for name in c_sources() if name.endswith("/cpu.c"))
    if compiler() is not None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_attempt, folders))
    return {folder: problem(folder) for folder in folders}


def _attempt(folder: str) -> None:
    with contextlib.suppress(OSError, RuntimeError, subprocess.SubprocessError, _BuildFailed):
        _build(folder)


class _BuildFailed(Exception):
    """The compiler's own words."""


def _load(folder: str) -> str | None:
    try:
        _libraries[folder] = ctypes.CDLL(str(_build(folder)))
    except (OSError, RuntimeError, subprocess.SubprocessError, _BuildFailed) as error:  # RuntimeError: no home folder
        reason = f"its C code could not be built: {error}"
        log.warning("kernels/%s/cpu.c: %s; slower code serves instead", folder, reason)
        return reason
    return None


def _build(folder: str) -> pathlib.Path:
    common = ("", folder)
    sources = {name: text for name, text in c_sources().items() if name.rpartition("/")[0] in common}
    settings = (sources, FLAGS, MACHINE_FLAGS, _openmp())
    identity = [repr(settings).encode(), _compiler_version(), _processor().encode()]
    key = hashlib.sha256(b"\0".join(identity)).hexdigest()[:16]
    built = cache_folder() / f"{folder}-{key}.so"
    if built.exists():  # also in a cache that cannot be written
        return built
    built = build_folder(built.parent) / built.name
    with _locked(built.with_suffix(".lock")):
        if not built.exists():
            _compile(folder, sources, built)
    return built


def _compile(folder: str, sources: dict[str, str], target: pathlib.Path) -> None:
    """Writes the shared library `target`, in full or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        here = pathlib.Path(scratch)
        for name, text in sources.items():
            (here / name).parent.mkdir(exist_ok=True)
            (here / name).write_text(text, "utf-8")
        source, compiled, linked = here / folder / "cpu.c", here / "cpu.o", here / "cpu.so"
        words = ""
        for machine in MACHINE_FLAGS:
            for openmp in ("-fopenmp", None):  # a compiler without OpenMP ignores the pragmas: one thread
                flags = [flag for flag in FLAGS if flag != "-fopenmp" or openmp]
                done = _run([*flags, *machine, f"-I{here}", "-c", str(source), "-o", str(compiled)])
                if done.returncode == 0:
                    runtime = [_openmp() or "-fopenmp"] if openmp else []
                    done = _run(["-shared", str(compiled), "-o", str(linked), *runtime, "-lm"])
                if done.returncode == 0:
                    os.replace(linked, target)
                    return
                words = done.stderr.strip() or words
        first = next((line for line in words.splitlines() if "error" in line), words.splitlines()[0] if words else "")
        raise _BuildFailed(f"{compiler()}: {first or 'failed without a word'}")


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [compiler() or "cc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@functools.cache
def _compiler_version() -> bytes:
    return subprocess.run([compiler() or "cc", "--version"], capture_output=True, check=False, timeout=60).stdout


@functools.cache
def _processor() -> str:
    """What -march=native depends on: the processor's name and instruction sets."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as lines:
            found = {line.strip() for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
        return "\n".join(sorted(found))
    return f"{platform.processor()} {platform.machine()}"


@functools.cache
def _openmp() -> str | None:
    """Path of the OpenMP runtime that torch has loaded; None where it cannot be told."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/maps") as lines:
        paths = [line.split(maxsplit=5)[-1].strip() for line in lines if "/" in line]
    return next((path for path in paths if re.match(r"lib[gi]?omp", os.path.basename(path))), None)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Waits until no other process holds `path`; without file locks (not POSIX) it does not wait.

    The file goes at the end. Who still waits for it, or makes it anew, finds the build done; and where it failed and
    two try at once, each renames a whole library.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
