"""The `rnnzoo` console script. A module of its own, because importing the package registers the Auto classes, which
loads transformers and torch: seconds that `rnnzoo --help` should not take."""

from __future__ import annotations

import os
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; the commands that load models register the Auto classes themselves."""
    before = os.environ.get("RNNZOO_NO_REGISTER")
    os.environ["RNNZOO_NO_REGISTER"] = "1"
    from rnnzoo.cli import main as run

    # Processes started from here, such as a model card's snippet, should register as any other does.
    if before is None:
        del os.environ["RNNZOO_NO_REGISTER"]
    else:
        os.environ["RNNZOO_NO_REGISTER"] = before
    run()


if __name__ == "__main__":
    main()
