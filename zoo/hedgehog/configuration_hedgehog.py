"""Configuration of Hedgehog layers."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig, check_exact_tokens, check_of_every_layer


@strict
class HedgehogConfig(RecurrentConfig):
    """Fields of window + linear attention.

    Args:
        window_size: tokens in the exact window of every kv head, the current one included.
        window_sizes: per layer, one window for each kv head; overrides `window_size`. Layers of other types: [].
        num_sinks: first tokens of a document that stay exact for ever.
        sink_distance: farthest distance at which a sink is seen, so that no rotation beyond the trained positions
            occurs; None: `max_position_embeddings`.
        feature_map: "softmax": phi(x) = [softmax(xW), softmax(-xW)] of the rotated heads (Hedgehog, LoLCATs);
            "prototype": phi(k) = exp(k C), phi(q) = softmax(qU + b) * exp(a) of the heads before rotation.
        feature_width: width of phi, 0 for no linear state; None: 2 * head_dim.
        feature_widths: per layer, the width of phi; overrides `feature_width`. Layers of other types: any number.
        window_factor: of the window's weights against the linear state's, at the start, with "softmax" features
            (LoLCATs: 0.1).
        initial_log_decay: of the linear state, per token, at the start (LoLCATs: 0).
        ring_bits: bits, 4 or 8, of the keys and of the values in window and sinks, in blocks that share a power of
            two (see `kernels/block_floating_point.py`); None: they keep the type of the activations.
    """

    model_type = "rnnzoo-hedgehog"
    mixer = "hedgehog"

    window_size: int = 64
    window_sizes: list[list[int]] | None = None
    num_sinks: int = 4
    sink_distance: int | None = None
    feature_map: str = "softmax"
    feature_width: int | None = None
    feature_widths: list[int] | None = None
    window_factor: float = 1.0
    initial_log_decay: float = -1e-3
    ring_bits: list[int] | None = None

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.feature_width is None:
            config.feature_width = 2 * config.head_dim
        if config.sink_distance is None:
            config.sink_distance = config.max_position_embeddings
        if config.feature_map not in ("softmax", "prototype"):
            raise ValueError(f"feature_map must be 'softmax' or 'prototype', got {config.feature_map!r}.")
        widths = [config.feature_width] if config.feature_widths is None else config.feature_widths
        if any(width < 0 for width in widths):
            raise ValueError(f"A feature width must be 0 or more, got {min(widths)}.")
        if config.feature_map == "softmax" and (odd := [width for width in widths if width % 2]):
            raise ValueError(f"feature_width must be even for softmax features, got {odd[0]}.")
        if config.window_factor <= 0:
            raise ValueError(f"window_factor must be positive, got {config.window_factor}.")
        if config.initial_log_decay > 0:
            raise ValueError(f"initial_log_decay must be 0 or less, got {config.initial_log_decay}.")
        check_exact_tokens(config)
        check_of_every_layer(config, "feature_widths")
