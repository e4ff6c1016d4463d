"""Configuration of Salient layers."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig, check_exact_tokens


@strict
class SalientConfig(RecurrentConfig):
    """Fields of attention to a bounded number of tokens.

    Args:
        window_size: tokens that every kv head keeps, recent and salient ones together, beside the sinks.
        window_sizes: per layer, that number for each kv head; overrides `window_size`. Layers of other types: [].
        recent_share: share of them that are the last tokens, the others are those with the largest scores; from 0 to 1,
            at least one token. 1: a window.
        num_sinks: first tokens of a document that stay for ever.
        sink_distance: tokens so far back are not seen any more, unless they are sinks, which are seen from no farther,
            so that no rotation beyond the trained positions occurs; None: `max_position_embeddings`.
        ring_bits: bits, 4 or 8, of the keys and of the values that are kept, in blocks that share a power of two (see
            `kernels/block_floating_point.py`); None: they keep the type of the activations.
    """

    model_type = "rnnzoo-salient"
    mixer = "salient"

    window_size: int = 64
    window_sizes: list[list[int]] | None = None
    recent_share: float = 0.34
    num_sinks: int = 4
    sink_distance: int | None = None
    ring_bits: list[int] | None = None

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.sink_distance is None:
            config.sink_distance = config.max_position_embeddings
        if not 0 <= config.recent_share <= 1:
            raise ValueError(f"recent_share must lie between 0 and 1, got {config.recent_share}.")
        check_exact_tokens(config)
        sizes = [[config.window_size]] if config.window_sizes is None else config.window_sizes
        if wrong := [size for layer in sizes for size in layer if size < 1]:
            raise ValueError(f"A kv head must keep at least one token, got {wrong[0]}.")
