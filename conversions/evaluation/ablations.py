"""What each branch of a model does alone: perplexity and recall with the other branches off.

A converted layer that has an exact window beside a linear state may bypass the state: the whole is good, and the state
holds nothing (arXiv 2510.05901). So every evaluation says what the linear part does without the window, and the other
way round. Layers without branches, kept attention among them, stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .perplexity import perplexity
from .recall import recall
from .scoring import Progress, no_progress

__all__ = ["ablation", "branches", "only"]


def _branched(model: PreTrainedModel) -> list[Any]:
    mixers = [getattr(block, "mixer", None) for block in getattr(model.base_model, "layers", [])]
    return [mixer for mixer in mixers if getattr(mixer, "branches", ())]


def branches(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the branches of its layers, in order of appearance; () for a model whose layers have one each."""
    return tuple(dict.fromkeys(branch for mixer in _branched(model) for branch in mixer.branches))


@contextlib.contextmanager
def only(model: PreTrainedModel, branch: str) -> Iterator[None]:
    """Within the block, `branch` works alone in every layer that has it."""
    with contextlib.ExitStack() as stack:
        for mixer in _branched(model):
            if branch in mixer.branches:
                stack.enter_context(mixer.only(branch))
        yield


def ablation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    branch: str | None,
    *,
    text: str,
    window: int,
    max_tokens: int,
    distances: Sequence[int],
    facts: int,
    chunk: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """{perplexity, stderr, n_tokens, window, recall: {distance: accuracy}} of one branch, or of the whole for None.

    A perplexity that no float holds is None.

    Args:
        text, window, max_tokens: of the perplexity. distances, facts, chunk: of the recall, one stream of it, with
            `text` as filler.
    """
    with only(model, branch) if branch else contextlib.nullcontext():
        try:
            found = perplexity(model, tokenizer, text, window=window, max_tokens=max_tokens, progress=progress)
            quality = {"perplexity": found.value, "stderr": found.stderr, "n_tokens": found.n_tokens}
        except OverflowError:  # a branch that was never meant to be alone
            quality = {"perplexity": None, "stderr": None, "n_tokens": max_tokens}
        how = {"distances": distances, "facts": facts, "streams": 1, "chunk": chunk}
        points = recall(model, tokenizer, filler=text, **how, progress=progress)
    recalled = {str(point.distance): point.accuracy for point in points}
    return {**quality, "window": window, "recall": recalled}
