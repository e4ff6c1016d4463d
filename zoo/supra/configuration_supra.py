"""Configuration of SUPRA."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class SupraConfig(RecurrentConfig):
    """Nothing beyond `RecurrentConfig`: SUPRA has no sizes of its own."""

    model_type = "rnnzoo-supra"
    mixer = "supra"
