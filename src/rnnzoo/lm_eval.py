"""lm-eval's command line, with the model `rnnzoo` in its registry:

python -m rnnzoo.lm_eval --model rnnzoo --model_args pretrained=DIR --tasks piqa --batch_size 8
"""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]


def main() -> None:
    """Run lm-eval with the arguments of the process."""
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("error: lm-eval is not installed: pip install 'rnnzoo[eval]'.")
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    from .conversions.evaluation import lm_eval_model  # noqa: F401  (registers the model)

    cli_evaluate()


if __name__ == "__main__":
    main()
