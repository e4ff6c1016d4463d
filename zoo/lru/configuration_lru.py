"""Configuration of the LRU."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class LRUConfig(RecurrentConfig):
    """`RecurrentConfig`, with LayerNorm and without an MLP by default (the block has a GLU), and the ring.

    Args:
        lru_state_size: complex numbers in the state; None for hidden_size.
        lru_r_min, lru_r_max: at the start the eigenvalues are uniform on the ring between these radii; close to 1 for
            tasks of long memory (the paper takes up to 0.9 and 0.999).
        lru_max_phase: largest angle of an eigenvalue at the start, in radians; small for long sequences (section 3.4).
    """

    model_type = "rnnzoo-lru"
    mixer = "lru"

    intermediate_size: int | None = 0
    norm_type: str = "layer"
    lru_state_size: int | None = None
    lru_r_min: float = 0.0
    lru_r_max: float = 1.0
    lru_max_phase: float = 6.28

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.lru_state_size is None:
            config.lru_state_size = config.hidden_size
        if not 0 <= config.lru_r_min < config.lru_r_max <= 1:
            raise ValueError(
                f"The ring needs 0 <= lru_r_min < lru_r_max <= 1, got {config.lru_r_min} and {config.lru_r_max}."
            )
