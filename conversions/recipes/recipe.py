"""What a recipe says."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Recipe"]


@dataclasses.dataclass
class Recipe:
    """A recipe; the package's docstring says what its fields mean."""

    name: str
    student: str
    stages: list[Any]  # of `stages.Stage`, which is asked about recipes and so imports this module
    description: str = ""
    source: str = ""
    student_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep: str = "none"
    ranking: list[int] = dataclasses.field(default_factory=list)
    state_budget: int | None = None
    seq_len: int = 2048
    tokens: int = 131072
    batch_tokens: int = 4096
    calibration_tokens: int = 6144
    progressive: bool = False
    stepwise: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
