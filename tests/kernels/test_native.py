"""Kernels in C: built once, by one of the processes that need them, and without a compiler other code serves."""

from __future__ import annotations

import ctypes
import logging
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import tempfile

import pytest
import torch

from rnnzoo.kernels import cache, native, sources
from rnnzoo.kernels.dispatch import explain
from rnnzoo.kernels.linear_scan import linear_scan

SOURCE = """#include "answer.h"
#include <stdint.h>
void answer(int64_t *to) { *to = ANSWER; }
"""
# Loads the folder "toy" of another source tree and prints its answer; notes when it is about to ask for the lock.
CHILD = """
import pathlib, sys
from rnnzoo.kernels import native, sources
sources.HERE = pathlib.Path(sys.argv[1])
import torch
locked = native._locked
def noted(path):
    with open(sys.argv[2], "a") as notes: notes.write("here\\n")
    return locked(path)
native._locked = noted
to = torch.zeros(1, dtype=torch.int64)
native.function("toy", "answer", "p")(native.pointer(to))
print(int(to))
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing known of compilers and builds; afterwards what was known before."""
    monkeypatch.setenv("RNNZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("RNNZOO_BACKEND", raising=False)
    monkeypatch.setattr(native, "_problems", {})
    monkeypatch.setattr(native, "_libraries", {})
    caches = (native.compiler, native.function, native._compiler_version, native._say_without_compiler)
    for kept in caches:
        kept.cache_clear()
    yield
    for kept in caches:
        kept.cache_clear()


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A source tree whose only kernel answers 42."""
    if native.compiler() is None:
        pytest.skip("no C compiler")
    tree = tmp_path / "kernels"
    (tree / "toy").mkdir(parents=True)
    (tree / "toy" / "cpu.c").write_text(SOURCE)
    (tree / "answer.h").write_text("#define ANSWER 42\n")
    monkeypatch.setattr(sources, "HERE", tree)
    return tree


def answer() -> int:
    to = torch.zeros(1, dtype=torch.int64)
    native.function("toy", "answer", "p")(native.pointer(to))
    return int(to)


def forget() -> None:
    """As a new process would begin."""
    native._problems.clear()
    native._libraries.clear()
    native.function.cache_clear()
    native.compiler.cache_clear()
    native._compiler_version.cache_clear()


def in_cache() -> list[str]:
    return sorted(path.name for path in native.cache_folder().glob("*"))


def fake_compiler(path: pathlib.Path, *lines: str) -> pathlib.Path:
    """A script that does `lines`; "$real" is the real compiler."""
    real = next(found for name in ("cc", "gcc", "clang") if (found := shutil.which(name)))
    path.write_text("\n".join(["#!/bin/sh", f"real={real}", *lines]) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def start(tree: pathlib.Path, notes: pathlib.Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(tree), str(notes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | environment, text=True, start_new_session=True, **pipes)


def test_a_second_process_loads_what_the_first_has_built(toy, monkeypatch):
    assert answer() == 42
    assert len(in_cache()) == 1 and in_cache()[0].startswith("toy-")
    forget()
    monkeypatch.setattr(native, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert answer() == 42


@pytest.mark.parametrize("header", ["answer.h", "toy/own.h"])
def test_a_changed_or_new_header_is_another_build(toy, header):
    assert answer() == 42
    before = in_cache()
    forget()
    (toy / header).write_text("#define ANSWER 43\n")
    assert answer() == (43 if header == "answer.h" else 42)
    assert len(in_cache()) == 2 and set(before) < set(in_cache())


def test_processes_that_start_at_once_wait_for_one_build_and_leave_one_file(toy, tmp_path):
    """The compiler does not begin before both processes are at the lock."""
    calls, notes = tmp_path / "calls", tmp_path / "notes"
    notes.touch()
    lines = [f'echo "$*" >> {calls}', 'if [ "$1" = --version ]; then exec "$real" --version; fi']
    lines += [f'until [ "$(wc -l < {notes})" -ge 2 ]; do sleep 0.05; done', 'exec "$real" "$@"']
    slow = fake_compiler(tmp_path / "slow", *lines)
    children = [start(toy, notes, CC=str(slow)) for _ in range(2)]
    for child in children:
        assert child.communicate() == ("42\n", "")
    assert sum(" -c " in call for call in calls.read_text().splitlines()) == 1
    assert len(in_cache()) == 1 and in_cache()[0].endswith(".so")


def test_a_killed_build_leaves_no_library_and_holds_nobody_up(toy, tmp_path):
    """The compiler kills itself and the process that waits for it, with half of its output written."""
    lines = ['if [ "$1" = --version ]; then exec "$real" --version; fi']
    lines += ['for last; do :; done; echo half > "$last"', "kill -KILL 0"]
    child = start(toy, tmp_path / "notes", CC=str(fake_compiler(tmp_path / "dying", *lines)))
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert list(native.cache_folder().rglob("cpu.o")) and not list(native.cache_folder().glob("*.so"))
    assert answer() == 42


def test_without_a_compiler_the_chunked_code_serves_and_the_log_says_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    a, x = torch.rand(1, 5, 3), torch.randn(1, 5, 3)
    call = {"a": a, "x": x, "initial_state": None, "seq_ids": None, "mask": None}
    with caplog.at_level(logging.WARNING, logger="rnnzoo.kernels"):
        assert native.problem("short_conv", build=False) == native.problem("linear_scan")
        assert "no C compiler found" in explain("linear_scan", call)["cpu"]
        h, _ = linear_scan(a, x)
    torch.testing.assert_close(h, linear_scan(a, x, backend="chunked")[0])
    assert [record.getMessage() for record in caplog.records if "no C compiler" in record.getMessage()] == [
        "no C compiler found (install gcc or clang, or name one with CC): slower kernels serve instead of those in C"
    ]
    with pytest.raises(RuntimeError, match="no C compiler found"):
        native.function("linear_scan", "linear_scan_forward", "p")
    assert set(native.build_all().values()) == {native.problem("linear_scan")}


def test_a_broken_compiler_is_quoted_and_the_chunked_code_serves(monkeypatch, tmp_path, caplog):
    if shutil.which("sh") is None:
        pytest.skip("no shell")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho warming up >&2\necho 'broken: error: out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    reason = native.problem("linear_scan")
    assert reason == f"its C code could not be built: {broken}: broken: error: out of order"
    assert reason in caplog.text
    linear_scan(torch.rand(1, 5, 3), torch.randn(1, 5, 3))
    assert in_cache() == []


@pytest.fixture
def unwritable(monkeypatch, tmp_path):
    """A cache that cannot be written, and a folder of temporary files of its own."""
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("RNNZOO_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    cache._say_temporary.cache_clear()
    return tmp_path / "temporary"


def test_where_the_cache_cannot_be_written_kernels_are_built_in_a_private_folder(toy, unwritable, monkeypatch, caplog):
    assert answer() == 42
    private = unwritable / f"rnnzoo-{os.getuid()}"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert [path.suffix for path in (private / "kernels").iterdir()] == [".so"]
    forget()
    monkeypatch.setattr(native, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert answer() == 42
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"builds are kept in {private / 'kernels'}; RNNZOO_CACHE chooses a folder" in caplog.text


@pytest.mark.parametrize("whose", ["another user's", "open to others", "a link"])
def test_a_temporary_folder_that_is_not_the_user_s_alone_is_refused(toy, unwritable, monkeypatch, tmp_path, whose):
    private = unwritable / f"rnnzoo-{os.getuid()}"
    if whose == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        private.symlink_to(tmp_path / "elsewhere")
    else:
        private.mkdir(mode=0o700)
    if whose == "open to others":
        private.chmod(0o777)
    if whose == "another user's":
        private.rename(unwritable / "rnnzoo-4711")
        private = unwritable / "rnnzoo-4711"
        monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert f"{private} is not a folder of this user alone" in native.problem("toy")
    assert not list(private.iterdir())


def test_what_a_cache_that_cannot_be_written_holds_is_used(toy, monkeypatch, caplog):
    assert answer() == 42
    forget()
    monkeypatch.setattr(native, "build_folder", lambda folder: pytest.fail("asked for a folder to write to"))
    assert answer() == 42


def test_the_openmp_runtime_is_the_one_that_torch_has_loaded(toy):
    """Other libraries' names have these three letters too: scipy's _decomp_update, for one."""
    native._openmp.cache_clear()
    found = native._openmp()
    if found is None:
        pytest.skip("torch has no OpenMP runtime of a known name here")
    assert os.path.basename(found).startswith(("libgomp", "libomp", "libiomp"))
    assert ctypes.CDLL(found).omp_get_max_threads() == torch.get_num_threads()
    native._openmp.cache_clear()
    pytest.importorskip("scipy.linalg")
    assert native._openmp() == found
