"""Learning rates over the steps of a stage."""

from __future__ import annotations

import math

from .base import TrainedStage

__all__ = ["rate_factor"]


def rate_factor(stage: TrainedStage, peak: float, step: int, steps: int) -> float:
    """What the rate `peak` is multiplied by at `step` (from 0) of `steps`.

    A linear warmup from 0 (none where there is but one step), then the stage's schedule from 1 to min_lr / peak.
    """
    warmup = math.ceil(stage.warmup * steps) if steps > 1 else 0  # the first step of a warmup has rate 0
    if step < warmup:
        return step / warmup
    if stage.schedule == "constant" or not peak:
        return 1.0
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if stage.schedule == "cosine" else 1.0 - done
    end = min(1.0, stage.min_lr / peak)
    return end + (1.0 - end) * left
