"""How far a model read in one pass and the same model read with its state disagree, by rounding and by mistake."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .scoring import Progress, Stream, encode, log_probs, no_progress

__all__ = ["Parity", "parity"]

FILLER = "The state of a recurrent model is all that it knows of the text before. "


@dataclass(frozen=True)
class Parity:
    """Over n tokens, each read alone after `context` tokens that were read at once.

    Attributes:
        max_probability, max_abs: largest difference of a probability, and of a log-probability, over the whole
            vocabulary; the second is mostly that of tokens which nobody expects.
        mean_kl: KL divergence of the token-by-token distribution from the one-pass one, nats a token.
        same_token: share of places at which both have the same most likely token.
    """

    context: int
    n: int
    max_probability: float
    max_abs: float
    mean_kl: float
    same_token: float
    dtype: str


@torch.no_grad()
def parity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    *,
    context: int = 448,
    steps: int = 64,
    progress: Progress = no_progress,
) -> Parity:
    """Reads `text` (None, or too short: repeated prose) both ways and compares the predictions of the last `steps`."""
    length = context + steps
    ids, _ = encode(tokenizer, (text or FILLER)[: 64 * length])
    while len(ids) < length:
        ids = torch.cat([ids, encode(tokenizer, FILLER)[0]])
    ids = ids[None, :length].to(model.device)
    progress("parity", 0, steps, {})
    whole = log_probs(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, context:])
    stream = Stream(model)
    stream.advance(ids[:, :context])
    likely = largest = divergence = same = 0.0
    for step in range(steps):
        alone = log_probs(model, stream.advance(ids[:, context + step : context + step + 1])[0])[0]
        likely = max(likely, float((alone.exp() - whole[step].exp()).abs().max()))
        largest = max(largest, float((alone - whole[step]).abs().max()))
        divergence += float((whole[step].exp() * (whole[step] - alone)).sum())
        same += float(alone.argmax() == whole[step].argmax())
        progress("parity", step + 1, steps, {})
    dtype = str(model.dtype).removeprefix("torch.")
    return Parity(context, steps, likely, largest, max(0.0, divergence / steps), same / steps, dtype)
