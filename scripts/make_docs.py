"""The documentation: a hook of mkdocs that adds the pages made from the code, and the command that builds the site.

    python scripts/make_docs.py             builds into site/, strictly: a broken link is an error
    python scripts/make_docs.py --serve     shows it at http://127.0.0.1:8000, and again at every change
    python scripts/make_docs.py --write DIR the Markdown of all pages, as mkdocs gets it

Pages under docs/ are written by hand; a line `<!-- generated: NAME -->` in them is replaced by what GENERATED[NAME]
makes, `<!-- include: FILE -->` by a file of the checkout. The pages of the zoo's architectures exist only here.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    from mkdocs.plugins import event_priority
except ImportError:  # not installed: the pages can still be written

    def event_priority(priority: float) -> Callable[[Any], Any]:
        return lambda function: function


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

MARK = re.compile(r"^<!-- (generated|include): (\S+) -->$", re.MULTILINE)


def _module(name: str) -> Any:
    """A module of site_pages. mkdocs loads this file by its path, and puts sys.path back when it has."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    return importlib.import_module(f"site_pages.{name}")


def _generated() -> dict[str, Callable[[], str]]:
    commands, kernels, recipes, zoo = map(_module, ("commands", "kernels", "recipes", "zoo"))
    return {
        "api-kernels": kernels.api,
        "commands": commands.sections,
        "from-attention": zoo.from_attention,
        "gallery": zoo.gallery,
        "kernels": kernels.sections,
        "lora": zoo.lora_table,
        "recipes": recipes.sections,
        "shared-fields": zoo.shared_fields,
    }


def fill(markdown: str) -> str:
    """A page with its marks replaced.

    Raises:
        KeyError: there is nothing of a mark's name. FileNotFoundError: no such file.
    """

    def replace(mark: re.Match[str]) -> str:
        kind, name = mark.groups()
        return _generated()[name]() if kind == "generated" else (ROOT / name).read_text()

    return MARK.sub(replace, markdown)


def zoo_pages() -> dict[str, str]:
    """Path under docs/ -> Markdown, for every architecture."""
    zoo = _module("zoo")
    return {f"zoo/{name}.md": zoo.page(name) for name in zoo.architectures()}


def write(folder: Path) -> None:
    """The Markdown of every page, hand-written and generated, into `folder`."""
    pages = {path.relative_to(ROOT / "docs").as_posix(): path.read_text() for path in (ROOT / "docs").rglob("*.md")}
    for name, text in (pages | zoo_pages()).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fill(text))


# What mkdocs calls.


@event_priority(100)  # before mkdocstrings, which then looks where its sources are
def on_config(config: Any) -> Any:
    """Puts the architectures into the navigation, and mkdocstrings on the right track."""
    for entry in config["nav"]:
        if isinstance(entry, dict) and "Zoo" in entry:
            entry["Zoo"] += [f"zoo/{name}.md" for name in _module("zoo").architectures()]
    config["plugins"]["mkdocstrings"].config.handlers["python"]["paths"] = [_sources()]
    return config


@functools.cache
def _sources() -> str:
    """A folder with the package as mkdocstrings can read it, for as long as this process lives.

    It reads no package without `__init__.py` inside one that has it, and `kernels/` must not have one (CONTRIBUTING).
    """
    package = ROOT / "src" / "rnnzoo"
    folder = Path(tempfile.mkdtemp(prefix="rnnzoo-docs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for source, target in ((package, folder / "rnnzoo"), (package / "kernels", folder / "rnnzoo" / "kernels")):
        target.mkdir()
        for path in source.iterdir():
            if path.name != "kernels":
                (target / path.name).symlink_to(path.resolve())
    (folder / "rnnzoo" / "kernels" / "__init__.py").touch()
    return str(folder)


def on_files(files: Any, config: Any) -> Any:
    """Adds the architectures' pages."""
    from mkdocs.structure.files import File

    for path, text in zoo_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return fill(markdown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--write", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "site", metavar="DIR")
    options = parser.parse_args()
    if options.write:
        write(options.write)
        return 0
    command = ["serve"] if options.serve else ["build", "--strict", "--clean", "--site-dir", str(options.out)]
    # Run as a module of this Python: the pages are made with what is installed in it. No page needs the Hub; the other
    # variable silences an advertisement of the theme's authors.
    environment = {"HF_HUB_OFFLINE": "1", "NO_MKDOCS_2_WARNING": "1"} | os.environ
    return subprocess.run([sys.executable, "-m", "mkdocs", *command], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
