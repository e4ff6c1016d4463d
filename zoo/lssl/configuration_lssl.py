"""Configuration of LSSL."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig
from ..s4.configuration_s4 import StateSpaceConfig


@strict
class LSSLConfig(StateSpaceConfig):
    """`StateSpaceConfig`, and what LSSL has to choose.

    Args:
        lssl_init: "legs" or "legt", the HiPPO matrix that A starts from.
        lssl_outputs: M, how many outputs every channel's state is read into.
    """

    model_type = "rnnzoo-lssl"
    mixer = "lssl"

    lssl_init: str = "legs"
    lssl_outputs: int = 1

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        StateSpaceConfig.check_state_space(config, even=False, lssl_init=("legs", "legt"))
        if config.lssl_outputs < 1:
            raise ValueError(f"lssl_outputs must be positive, got {config.lssl_outputs}.")
