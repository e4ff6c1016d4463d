"""Configuration of Liger."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class LigerConfig(RecurrentConfig):
    """`RecurrentConfig`, the window, and the range of the gates.

    Args:
        liger_window: tokens that the attention beside the state sees, the current one included.
        liger_gate_divisor: by which the gates' logarithm is divided, so that they start near 1.
    """

    model_type = "rnnzoo-liger"
    mixer = "liger"

    liger_window: int = 64
    liger_gate_divisor: float = 16.0

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        for name in ("liger_window", "liger_gate_divisor"):
            if getattr(config, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(config, name)}.")
