"""What only the model code knows of a model folder: bytes of state. For cards, which know no model code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..kernels.files import object_or_nothing

__all__ = ["model_facts"]


def model_facts(folder: Path) -> dict[str, Any]:
    """state_bytes, state_bytes_per_token and layer_state_bytes of a model of the zoo, from its config.json; {} for any
    other folder."""
    raw = object_or_nothing(folder / "config.json")
    kind = str(raw.get("model_type"))
    if not kind.startswith("rnnzoo-"):
        return {}
    import torch

    from ..zoo.core.sizes import architecture_config, attention_bytes_per_token, layer_state_bytes, window_bytes

    try:
        config = architecture_config(kind.removeprefix("rnnzoo-")).from_pretrained(folder)
    except ModuleNotFoundError:  # an architecture of another version
        return {}
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."))
    layers = layer_state_bytes(config, dtype)
    return {
        "state_bytes": sum(layers) + window_bytes(config, dtype),
        "state_bytes_per_token": attention_bytes_per_token(config, dtype),
        "layer_state_bytes": layers,
    }
