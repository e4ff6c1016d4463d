"""The third column: the teacher cut to an exact window plus a few sink tokens, at the student's state bytes.

No training: what a bounded key-value cache alone gives (StreamingLLM, Xiao et al. 2023). Every layer and key-value head
has the same window, the last `window` tokens (self included) and the first `sinks` tokens are attended to.

Positions are the teacher's own. Only where a query lies beyond the trained length is its distance to the sinks held at
the trained length (the query is turned back for the sink columns), because the window's distances stay small by
themselves and the sinks' would not. That needs frequencies that do not depend on the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ...kernels.errors import RnnzooError
from ...zoo.core.rotary import turn

__all__ = ["SINKS", "WindowSpec", "active_window", "kv_bytes_per_token", "window_attention", "window_for_bytes"]

SINKS = 4
_NAME = "rnnzoo_window"
_ATTRIBUTE = "_rnnzoo_window"
_QUERY_BLOCK = 256  # rows of queries at a time: the scores held are at most 256 x (window + 256 + sinks)
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass
class WindowSpec:
    """What the attention function needs to know while a window is in force.

    `dropped` is how many tokens between the sinks and the kept part the caller has thrown out of the cache;
    `limit` is the furthest position (0-based) that queries may claim towards the sinks.
    """

    window: int
    sinks: int
    limit: int | None = None
    inverse_frequencies: Tensor | None = None
    dropped: int = 0

    def max_context(self, trained_length: int) -> int | None:
        """Tokens up to which this baseline is meaningful; None: no bound."""
        return None if self.limit is not None else trained_length

    def trim(self, keys: Tensor) -> Tensor:
        """Keys or values (B, H, S, D) without the tokens that no later query can see."""
        keep = self.sinks + self.window - 1
        if keys.shape[2] <= keep:
            return keys
        return torch.cat([keys[:, :, : self.sinks], keys[:, :, keys.shape[2] - (self.window - 1) :]], dim=2)


def active_window(model: PreTrainedModel) -> WindowSpec | None:
    return getattr(model, _ATTRIBUTE, None)


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that one token adds to the teacher's key-value cache, over all layers."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * kv_heads * 2 * head_dim * dtype.itemsize


def window_for_bytes(
    config: PreTrainedConfig, state_bytes: int, dtype: torch.dtype = torch.bfloat16, sinks: int = SINKS
) -> int:
    """The largest window that fits, with the sinks, into `state_bytes`.

    Raises:
        RnnzooError: the bytes hold no more than the sinks.
    """
    window = state_bytes // kv_bytes_per_token(config, dtype) - sinks
    if window < 1:
        raise RnnzooError(
            f"{state_bytes} bytes of state hold {window + sinks} tokens of the teacher's keys and values, too few for "
            f"{sinks} sink tokens and a window of one: the window baseline cannot be measured."
        )
    return window


@contextmanager
def window_attention(model: PreTrainedModel, window: int, sinks: int = SINKS) -> Iterator[WindowSpec]:
    """Within the block, `model` attends to the last `window` tokens and the first `sinks` tokens only.

    Works for every family that takes its attention from transformers' AttentionInterface, with or without a 2D padding
    mask, in one pass or chunk by chunk with a cache. `rnnzoo.conversions.evaluation.scoring.Stream` also throws out of
    the cache what cannot be seen any more.
    """
    if window < 1 or sinks < 0:
        raise RnnzooError(f"window must be at least 1 and sinks at least 0, not {window} and {sinks}.")
    spec = WindowSpec(window, sinks, *_sink_limit(model))
    _register(spec)
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    setattr(model, _ATTRIBUTE, spec)
    try:
        yield spec
    finally:
        model.config._attn_implementation = before
        delattr(model, _ATTRIBUTE)


def _sink_limit(model: PreTrainedModel) -> tuple[int | None, Tensor | None]:
    rotary = getattr(model.base_model, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None or getattr(rotary, "rope_type", "default") not in _STATIC_ROPE:
        return None, None
    return model.config.max_position_embeddings - 1, frequencies.detach().float()


def _register(spec: WindowSpec) -> None:
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        output = _attend(spec, query, key, value, attention_mask, scaling, sliding_window)
        return output.transpose(1, 2).contiguous(), None

    def mask(*args: object, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor | None:
        return None if attention_mask is None or bool(attention_mask.all()) else attention_mask

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, mask)


def _attend(
    spec: WindowSpec,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, Hk, S, D)
    value: Tensor,
    mask: Tensor | None,  # (B, S), True = a real token
    scaling: float | None,
    own_window: int | None,  # the teacher's own sliding window, where it has one
) -> Tensor:
    steps, length = query.shape[2], key.shape[2]
    slots = torch.arange(length, device=query.device)
    if mask is None:
        key_positions = torch.where(slots < spec.sinks, slots, slots + spec.dropped)[None]  # (1, S)
    else:
        key_positions = mask.long().cumsum(-1) - 1  # (B, S)
    outputs = []
    for start in range(0, steps, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, steps)
        first, last = length - steps + start, length - steps + stop  # slots of these queries
        reach = first - spec.window + 1
        if mask is None and reach > spec.sinks:
            columns = torch.cat([slots[: spec.sinks], slots[reach:last]])
        else:
            columns = slots[:last]
        rows = key_positions[:, first:last, None]  # (., Tb, 1)
        cols = key_positions[:, None, columns]  # (., 1, S')
        distance = rows - cols
        visible = (distance >= 0) & ((distance < spec.window) | (cols < spec.sinks))
        if own_window is not None:
            visible &= distance < own_window
        if mask is not None:
            # A padding query sees itself, so that no row of the softmax is empty.
            visible = visible & mask[:, None, columns] | (slots[first:last, None] == columns)
        outputs.append(
            _softmax(
                spec, query[:, :, start:stop], key[:, :, columns], value[:, :, columns], rows, cols, visible, scaling
            )
        )
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _softmax(
    spec: WindowSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    cols: Tensor,
    visible: Tensor,
    scaling: float | None,
) -> Tensor:
    width = value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if spec.limit is not None and spec.sinks and int(rows.max()) > spec.limit:
        # Two queries in one product: [own | turned back] against [key | 0] in the window and [0 | key] at the sinks.
        assert spec.inverse_frequencies is not None
        turned = _turn_back(query, (rows[..., 0] - spec.limit).clamp(min=0), spec.inverse_frequencies)
        sink = (cols[:, 0] < spec.sinks)[:, None, :, None]  # (., 1, S', 1)
        zero = key.new_zeros(())
        query = torch.cat([query, turned], dim=-1)
        key = torch.cat([torch.where(sink, zero, key), torch.where(sink, key, zero)], dim=-1)
        value = F.pad(value, (0, key.shape[-1] - width))  # torch's fast kernel wants one width for all: 4 times as fast
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible[:, None], scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )
    return output[..., :width]


def _turn_back(query: Tensor, steps: Tensor, frequencies: Tensor) -> Tensor:
    """Rotated queries (B, H, T, D) as they would be `steps` (., T) positions earlier; half-split rotary layout."""
    angle = -steps[:, None, :, None].float() * torch.cat([frequencies, frequencies]).to(query.device)
    return turn(query.float(), angle.cos(), angle.sin()).to(query.dtype)
