"""Configuration of TOVA."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class TovaConfig(RecurrentConfig):
    """`RecurrentConfig`, and how much a layer keeps.

    Args:
        tova_states: tokens whose keys and values a layer keeps, the same for all its heads.
    """

    model_type = "rnnzoo-tova"
    mixer = "tova"

    tova_states: int = 512

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.tova_states < 1:
            raise ValueError(f"tova_states must be at least 1, got {config.tova_states}.")
