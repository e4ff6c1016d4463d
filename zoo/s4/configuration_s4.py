"""Configuration of S4, and what all linear state spaces share."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig

# Models of the Long Range Arena, where the layers follow each other without MLPs.
LONG_RANGE = {"num_hidden_layers": 6, "intermediate_size": 0, "norm_type": "layer"}


@strict
class StateSpaceConfig(RecurrentConfig):
    """`RecurrentConfig`, and the sizes of a linear state space per channel (S4, S4D, LSSL).

    Args:
        s4_state_size: N, numbers of a channel's state; complex ones count twice, as pairs of conjugates.
        s4_dt_min, s4_dt_max: step of the discretisation at initialisation, one a channel, log-uniform.
    """

    s4_state_size: int = 64
    s4_dt_min: float = 0.001
    s4_dt_max: float = 0.1

    @staticmethod
    def check_state_space(config: RecurrentConfig, even: bool, **choices: tuple[str, ...]) -> None:
        """Raises ValueError for a state size or steps that cannot be, and for fields that are none of their choices."""
        if config.s4_state_size < 1 or (even and config.s4_state_size % 2):
            kind = "even, for pairs of complex conjugates" if even else "positive"
            raise ValueError(f"s4_state_size must be {kind}, got {config.s4_state_size}.")
        if not 0 < config.s4_dt_min <= config.s4_dt_max:
            raise ValueError(f"0 < s4_dt_min <= s4_dt_max must hold, got {config.s4_dt_min} and {config.s4_dt_max}.")
        for field, allowed in choices.items():
            if getattr(config, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {getattr(config, field)!r}.")


@strict
class S4Config(StateSpaceConfig):
    """`StateSpaceConfig`, and S4's initialisation.

    Args:
        s4_init: "legs" (rank 1) or "legt" (rank 2), the HiPPO matrix that A starts from.
    """

    model_type = "rnnzoo-s4"
    mixer = "s4"

    s4_init: str = "legs"

    sizes = {
        "LRA-image": LONG_RANGE | {"hidden_size": 512},
        "LRA-path-x": LONG_RANGE | {"hidden_size": 256, "s4_dt_min": 0.0001},
    }

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        StateSpaceConfig.check_state_space(config, even=True, s4_init=("legs", "legt"))
