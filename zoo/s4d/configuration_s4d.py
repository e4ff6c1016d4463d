"""Configuration of S4D."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig
from ..s4.configuration_s4 import S4Config, StateSpaceConfig


@strict
class S4DConfig(StateSpaceConfig):
    """`StateSpaceConfig`, and what S4D has to choose.

    Args:
        s4d_init: "legs", "inv" or "lin": how the eigenvalues start.
        s4d_discretization: "zoh" or "bilinear".
    """

    model_type = "rnnzoo-s4d"
    mixer = "s4d"

    s4d_init: str = "lin"
    s4d_discretization: str = "zoh"

    sizes = S4Config.sizes

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        choices = {"s4d_init": ("legs", "inv", "lin"), "s4d_discretization": ("zoh", "bilinear")}
        StateSpaceConfig.check_state_space(config, even=True, **choices)
