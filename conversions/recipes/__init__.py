"""Recipes: YAML files that name a student mixer, the layers kept as attention, and the stages with their tokens.

name, description, source       who it is and where it comes from
student, student_options        the mixer, and fields of its configuration
keep                            layers that stay attention: none, a share such as 1/4, a list of numbers, first, last or
                                best with a number or a share, such as best 25%; see `keep.py`
ranking                         all layers, the most important first, for best; none: measured before the first stage
state_budget                    bytes of recurrent state in all, divided by measured error, see `conversions/stages`
seq_len, tokens, batch_tokens   length of a training sequence; training tokens in all; tokens of an optimiser step
calibration_tokens              text of the closed-form stage
progressive                     convert 1/4, 1/2, 3/4, 7/8 ... of the layers, with a run of the stages at each step
stepwise                        the same, but one layer more at each step
stages                          list of {name, kind, share, ...}, see `conversions/stages`
"""

from __future__ import annotations

from pathlib import Path

import yaml

from .keep import keep_steps, kept_layers, parse_keep
from .recipe import Recipe

__all__ = ["FOLDER", "Recipe", "keep_steps", "kept_layers", "list_recipes", "parse_keep"]

FOLDER = Path(__file__).parent


def list_recipes() -> dict[str, str]:
    """Name -> one line about it; reads no stage, so that nothing heavy is imported."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))["description"] for file in files}
