"""Everything is declared in pyproject.toml; this file only refuses to build a package that would be silently empty.

The folders kernels, zoo, conversions and cards reach the package through symbolic links in src/rnnzoo. A checkout
without symbolic links (the default of Git on Windows) has small text files there instead.
"""

from pathlib import Path

from setuptools import setup

ROOMS = ("kernels", "zoo", "conversions", "cards")
PACKAGE = Path(__file__).resolve().parent / "src" / "rnnzoo"

missing = [room for room in ROOMS if not any((PACKAGE / room).rglob("*.py"))]
if missing:
    raise SystemExit(
        f"rnnzoo cannot be built: src/rnnzoo/{', src/rnnzoo/'.join(missing)} should be symbolic links to the folders "
        "of the same name, with Python files in them. Clone again with `git clone -c core.symlinks=true`, on a file "
        "system that has symbolic links."
    )

setup()
