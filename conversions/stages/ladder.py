"""The ladder of a conversion: perplexity of the same held-out text after each stage, and of the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...kernels.errors import RnnzooError
from ..evaluation.perplexity import perplexity
from ..precision import mixed_precision

__all__ = ["TOKENS", "held_out_perplexity"]

TOKENS = 4096  # few: every stage pays for them


def held_out_perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int,
    bf16: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float | int | None]:
    """{value, stderr, tokens} over the first 4,096 tokens, in windows of at most half of them; {} for too little text.

    Args:
        model: on any device; it is measured where training takes place, in eval mode, and put back.
        bf16: autocast, as in training. progress: called with (tokens so far, tokens in all).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = next(model.parameters()).device
    model.to(device).eval()
    try:
        with mixed_precision(device, bf16):
            found = perplexity(
                model,
                tokenizer,
                "\n\n".join(texts),
                window=max(2, min(window, TOKENS // 2)),
                max_tokens=TOKENS,
                progress=lambda what, done, total, info: progress(done, total),
            )
    except OverflowError:  # a raw swap can be as bad as that
        return {}
    except RnnzooError:  # not even two tokens
        return {}
    finally:
        model.to(before)
    if not math.isfinite(found.value):
        return {}
    return {"value": found.value, "stderr": found.stderr, "tokens": found.n_tokens}
