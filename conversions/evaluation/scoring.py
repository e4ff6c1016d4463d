"""What every measure shares: log probabilities without full logits, a model read chunk by chunk, bytes of a cache.

All of it works for a teacher (key-value cache), a student (recurrent state) and the teacher inside `window_attention`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ...zoo.core.cache import CACHE_NAME
from .window_baseline import active_window

__all__ = ["Progress", "Stream", "cache_bytes", "encode", "log_probs", "no_progress", "prefix_token", "token_log_probs"]

Progress = Callable[[str, int, int, dict[str, Any]], None]  # (what, done, total, info)

_ROWS = 256  # rows of logits held at a time, in float32


def no_progress(what: str, done: int, total: int, info: dict[str, Any]) -> None:
    """The default: says nothing."""


def _head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(N, D) -> (N, vocab) float32, with the cap or scale that the model's own forward applies."""
    logits = model.get_output_embeddings()(hidden).float()
    scale = getattr(model.config, "logit_scale", None)
    cap = getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "logit_cap", None)
    logits = logits * scale if scale else logits
    return torch.tanh(logits / cap) * cap if cap else logits


@torch.no_grad()
def log_probs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Log probabilities (N, vocab), float32, of a few rows of hidden states (N, D)."""
    return _head_logits(model, hidden).log_softmax(-1)


@torch.no_grad()
def token_log_probs(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Natural log probability of each target, never holding more than 256 rows of logits.

    Args:
        hidden: (N, D), last hidden states after the final norm. targets: (N,) token ids.
    Returns:
        (N,) float32.
    """
    parts = []
    for rows, labels in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True):
        logits = _head_logits(model, rows)
        parts.append(logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Tensor, Tensor]:
    """Tokens of one text without special tokens, and the UTF-8 bytes each stands for.

    Returns:
        ids (N,) int64; bytes (N,) int64, whose sum is the text's length in bytes. Where one character is split over
        several tokens the first of them takes its bytes.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    sizes, reached = [], 0
    for _, end in offsets:
        sizes.append(len(text[reached:end].encode()) if end > reached else 0)
        reached = max(reached, end)
    if sizes and reached < len(text):
        sizes[-1] += len(text[reached:].encode())
    return torch.tensor(ids, dtype=torch.long), torch.tensor(sizes, dtype=torch.long)


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before a text that is scored from its very first token: BOS, else EOS, else 0."""
    return next(token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if token is not None)


def cache_bytes(cache: Any) -> int:
    """Bytes of a student's state or of a transformers key-value cache."""
    if hasattr(cache, "num_bytes"):
        return int(cache.num_bytes())
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    )


class Stream:
    """A model reading one long sequence chunk by chunk, its memory bounded by its cache.

    Attributes:
        seen: tokens read so far. cache: the model's own cache object, None before the first chunk.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.window = active_window(model)
        self.cache: Any = DynamicCache() if self.window else None
        self.seen = 0

    @torch.no_grad()
    def advance(self, ids: Tensor) -> Tensor:
        """Reads ids (B, T); returns hidden states (B, T, D)."""
        inputs: dict[str, Any] = {"input_ids": ids, CACHE_NAME: self.cache, "use_cache": True}
        if self.cache is None or type(self.cache) is DynamicCache:
            inputs["position_ids"] = torch.arange(self.seen, self.seen + ids.shape[1], device=ids.device)[None]
        if self.window:
            self.window.dropped = self.seen - self.cache.get_seq_length()
        output = self.model.base_model(**inputs)
        self.cache = getattr(output, CACHE_NAME)
        self.seen += ids.shape[1]
        if self.window:
            for layer in self.cache.layers:
                layer.keys, layer.values = self.window.trim(layer.keys), self.window.trim(layer.values)
        return output.last_hidden_state

    def fork(self, copies: int = 1) -> Stream:
        """An independent continuation, repeated `copies` times along the batch; this stream stays as it is."""
        other = copy.copy(self)
        if type(self.cache) is DynamicCache:
            # A dynamic layer never writes into its tensors (it concatenates), so they may be shared.
            other.cache = copy.copy(self.cache)
            other.cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        else:
            other.cache = copy.deepcopy(self.cache)
        if copies > 1:
            other.cache.batch_repeat_interleave(copies)
        return other

    def state_bytes(self) -> int:
        return 0 if self.cache is None else cache_bytes(self.cache)
