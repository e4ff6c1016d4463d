"""`python -m rnnzoo` is the `rnnzoo` command."""

from __future__ import annotations

from .cli import main

main()
