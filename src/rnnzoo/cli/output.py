"""What every command has in common: --json, --quiet, and where its words go.

stdout holds the result and nothing else (one JSON document with --json); notes and progress go to stderr, and nowhere
with --quiet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Output", "output_options"]


def output_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add --json and --quiet to a command; it receives them as the argument `output`."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
    @click.option("-q", "--quiet", is_flag=True, help="No notes and no progress.")
    @functools.wraps(function)
    def command(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> None:
        output = Output(as_json, quiet)
        output.set_up_libraries()
        function(*args, output=output, **kwargs)

    return command


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a command's words go; see the module."""

    as_json: bool
    quiet: bool

    def result(self, value: Any, show: Callable[[Console], None]) -> None:
        """Print the result: `value` as JSON with --json, else what `show` draws."""
        if self.as_json:
            print(json.dumps(_plain(value), indent=2, ensure_ascii=False))
            return
        from rich.console import Console

        # A pipe has no width: lines of a table that is read by a program should not be folded at 80.
        show(Console(width=None if sys.stdout.isatty() else 140, highlight=False, soft_wrap=False))

    def note(self, text: str) -> None:
        """A line for the reader, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)

    @contextlib.contextmanager
    def only_result_on_stdout(self) -> Iterator[None]:
        """Send what libraries print to stdout to stderr (with --quiet nowhere) while the work is done."""
        self._hide_loading_bars()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if self.quiet else sys.stderr):
            yield

    def _hide_loading_bars(self) -> None:
        """transformers' bars of loading and saving would break ours; the Hub's bars of downloads stay."""
        from huggingface_hub.utils import enable_progress_bars
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        if not self.quiet and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0") in ("", "0"):
            enable_progress_bars()

    def set_up_libraries(self) -> None:
        """Before transformers is imported: its warnings and loading bars speak to programmers, not to users."""
        if os.environ.get("RNNZOO_DEBUG"):
            logging.basicConfig(format="%(name)s: %(message)s")
            logging.getLogger("rnnzoo").setLevel(logging.DEBUG)
            return
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        warnings.simplefilter("ignore")
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger = logging.getLogger("rnnzoo")
        logger.handlers[:] = [handler]
        logger.setLevel(logging.ERROR if self.quiet else logging.INFO)
        if self.quiet:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def _plain(value: Any) -> Any:
    """What JSON can hold: dataclasses become objects, paths strings, sets lists; NaN and infinity null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    item = getattr(value, "item", None)  # a number of numpy or torch
    return str(value) if item is None else _plain(item())
