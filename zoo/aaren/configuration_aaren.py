"""Configuration of Aaren."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class AarenConfig(RecurrentConfig):
    """Nothing beyond `RecurrentConfig`: an Aaren layer is an attention layer with one more vector."""

    model_type = "rnnzoo-aaren"
    mixer = "aaren"
