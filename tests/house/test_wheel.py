"""The built packages hold every source file once, and a checkout without symbolic links cannot be built."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "zoo", "conversions", "cards")
SHIPPED = {".py", ".typed", ".j2", ".yaml", ".c", ".h"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the build reads, so that it leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in ("src", *ROOMS):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    return copy


def expected_files() -> set[str]:
    """Paths in the package, from the real folders."""
    found = {"rnnzoo_command.py"}
    for folder, base in [(ROOT / "src" / "rnnzoo", ROOT / "src"), *((ROOT / room, ROOT) for room in ROOMS)]:
        for file in folder.rglob("*"):  # does not follow links
            if file.is_file() and file.suffix in SHIPPED:
                path = file.relative_to(base).as_posix()
                found.add(path if path.startswith("rnnzoo/") else f"rnnzoo/{path}")
    return found


def build(kind: str, checkout: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.iterdir())


def test_wheel_holds_every_source_file_once_and_nothing_else(checkout, tmp_path):
    wheel = build("wheel", checkout, tmp_path)
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(expected_files())
    for room in ROOMS:
        assert any(name.startswith(f"rnnzoo/{room}/") for name in names)


def test_sdist_holds_every_source_file(checkout, tmp_path):
    with tarfile.open(build("sdist", checkout, tmp_path)) as archive:
        names = {
            member.name.partition("/")[2].removeprefix("src/") for member in archive.getmembers() if member.isfile()
        }
    assert expected_files() <= names
    assert "setup.py" in names


def test_the_index_would_take_both(checkout, tmp_path):
    """What `twine check --strict` says of their metadata and of the README as the project's page."""
    files = [build(kind, checkout, tmp_path / kind) for kind in ("wheel", "sdist")]
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_build_without_symbolic_links_fails_and_says_why(checkout, tmp_path):
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy, symlinks=True)
    (copy / "src/rnnzoo/kernels").unlink()
    (copy / "src/rnnzoo/kernels").write_text("../../kernels")  # what Git writes where there are no links
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=copy, capture_output=True, text=True)
    assert done.returncode != 0
    assert "src/rnnzoo/kernels should be symbolic links" in done.stderr
