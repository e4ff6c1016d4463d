"""What the files of a model folder say of it, where no run has recorded more: configuration and headers of weights."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ..kernels.errors import RnnzooError
from ..kernels.files import object_or_nothing, read_object

__all__ = ["describe", "said_by_publisher"]

HEADER_BYTES = 100_000_000  # safetensors' own limit
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def describe(folder: Path) -> dict[str, Any]:
    """`model` or `adapter` of a folder as results.json would hold it; {} where there is neither.

    Raises:
        RnnzooError: config.json or adapter_config.json is not readable.
    """
    if (folder / "adapter_config.json").is_file():
        return {"adapter": _adapter(folder)} | {"model": {"name": folder.resolve().name}}
    if (folder / "config.json").is_file():
        return {"model": _model(folder)}
    return {}


def _model(folder: Path) -> dict[str, Any]:
    config = read_object(folder / "config.json", "save the model again")
    kind = str(config.get("model_type") or "")
    classes = config.get("architectures") or [None]
    model: dict[str, Any] = {
        "name": folder.resolve().name,
        "architecture": kind.removeprefix("rnnzoo-") if kind.startswith("rnnzoo-") else classes[0] or kind or None,
        "model_type": kind or None,
        "layer_types": config.get("layer_types"),
        "windows": config.get("window_sizes"),
        "feature_widths": config.get("feature_widths"),
        "window_bits": config.get("ring_bits"),
        "chat_template": _chats(folder),
    }
    return {key: value for key, value in (model | _weights(folder, "*.safetensors")).items() if value is not None}


def _adapter(folder: Path) -> dict[str, Any]:
    """The base is a Hub id, or the name of a folder: never the path of the machine that trained."""
    config = read_object(folder / "adapter_config.json", "save the model again")
    base = str(config.get("base_model_name_or_path") or "")
    targets = config.get("target_modules") or []
    known = {
        "peft_type": config.get("peft_type"),
        "base_model": base if _ID.fullmatch(base) and not os.path.isdir(base) else None,
        "base_name": os.path.basename(base.rstrip("/")) or None,
        "sha": config.get("revision"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": [targets] if isinstance(targets, str) else sorted(map(str, targets)),
    }
    return {key: value for key, value in (known | _weights(folder, "adapter*.safetensors")).items() if value}


def _chats(folder: Path) -> bool:
    in_config = object_or_nothing(folder / "tokenizer_config.json").get("chat_template")
    return any(folder.glob("chat_template*")) or bool(in_config)


def _weights(folder: Path, pattern: str) -> dict[str, Any]:
    """How many numbers, and their most common type, from headers alone; {} for no files or a damaged one."""
    shapes: dict[str, tuple[int, str]] = {}
    for file in sorted(folder.glob(pattern)):
        try:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length)) if length <= HEADER_BYTES else {}
            for name, entry in header.items():
                if name != "__metadata__":
                    shapes[name] = (math.prod(entry["shape"]), entry["dtype"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
    if not shapes:
        return {}
    numbers: Counter[str] = Counter()
    for count, dtype in shapes.values():
        numbers[dtype] += count
    common = numbers.most_common(1)[0][0]
    return {"parameters": sum(numbers.values()), "dtype": _DTYPES.get(common, common.lower())}


def said_by_publisher(**said: Any) -> dict[str, Any]:
    """What a publisher says of a model, checked, for `publish` in results.json; what is not said is left out.

    Args:
        licence: a name. language: codes. datasets, collections: ids on the Hub, or their addresses.
    Raises:
        RnnzooError: an id that is none.
    """
    found: dict[str, Any] = {key: value for key, value in said.items() if value}
    for key, kind in (("datasets", "dataset"), ("collections", "collection")):
        ids = [re.sub(rf"^https?://huggingface\.co/{key}/", "", str(one)).strip("/") for one in found.get(key, ())]
        if wrong := [one for one in ids if not _ID.fullmatch(one)]:
            raise RnnzooError(f"--{kind} is {wrong[0]!r}; expected owner/name, as in its address on the Hub.")
        found |= {key: ids} if ids else {}
    if "language" in found:
        found["language"] = list(found["language"])
    return found
