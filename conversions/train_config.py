"""What a training from scratch is asked for: the configuration of its model, and how to train it."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from ..kernels.errors import RnnzooError
from ..zoo.core.configuration import RecurrentConfig
from ..zoo.core.registry import architectures, config_class
from ..zoo.core.sizes import architecture_config, causal_lm_class

__all__ = ["TrainSettings", "architecture_of", "new_config", "parse_settings"]


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        context: tokens in a sequence. batch_size: sequences in a batch of one process. accumulate: batches in a step.
        tokens: in all, texts that are shorter are read again; or steps: optimiser steps; neither: the text once.
        learning_rate: highest, after `warmup` (a share of the steps); it falls to a tenth of it along a cosine.
        weight_decay: of matrices; vectors, decay rates and norms have none.
        eval_fraction: share of the documents that is held out.
        dtype: "float32", or "bfloat16": autocast in training, and of the saved weights.
    """

    context: int = 512
    batch_size: int = 8
    accumulate: int = 1
    tokens: int | None = None
    steps: int | None = None
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    eval_fraction: float = 0.02
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.tokens is not None and self.steps is not None:
            raise RnnzooError("Say either tokens or steps, not both.")
        if not 0 < self.eval_fraction < 1:
            raise RnnzooError(f"The held-out share is {self.eval_fraction}; it must lie between 0 and 1.")
        if self.learning_rate <= 0 or self.context < 2 or min(self.batch_size, self.accumulate) < 1:
            raise RnnzooError("The learning rate must be above 0, the context at least 2, batch and accumulation 1.")
        if self.dtype not in ("float32", "bfloat16"):
            raise RnnzooError(f"dtype is {self.dtype!r}; expected bfloat16 or float32.")


def new_config(
    arch: str | None, file: str | Path | None, size: str | None, fields: dict[str, Any], tokenizer: Any
) -> RecurrentConfig:
    """The configuration that was asked for, with the tokenizer's vocabulary and special tokens.

    Args:
        arch: name of an architecture; or file: a config.json of the zoo. size: one of the architecture's published
            sizes. fields: win over either.
    Raises:
        RnnzooError: neither or both of arch and file, unknown names, values that do not fit together, a vocabulary that
            is too small for the tokenizer.
    """
    if (arch is None) == (file is None):
        raise RnnzooError("Say either which architecture (--arch) or which configuration (--config) to train.")
    given: dict[str, Any] = {}
    if file is not None:
        arch, given = _from_file(Path(file))
    assert arch is not None
    if arch not in architectures():
        raise RnnzooError(f"{_unknown('architecture', arch, architectures())}; see `rnnzoo list`.")
    cls = architecture_config(arch)
    if size is not None:
        if size not in cls.sizes:
            raise RnnzooError(f"{_unknown(f'size of {arch}', size, cls.sizes)}; see `rnnzoo list --sizes`.")
        given |= cls.sizes[size]
    given |= fields
    needed = len(tokenizer)
    if file is None and "vocab_size" not in fields:
        given["vocab_size"] = needed
    given |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _refuse_unknown(cls, arch, given)
    try:
        config = cls(**given)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RnnzooError(f"This {arch} model cannot be built: {' '.join(str(error).split())}") from error
    if config.vocab_size < needed:
        raise RnnzooError(f"vocab_size is {config.vocab_size}, but the tokenizer has {needed} tokens.")
    config.architectures = [causal_lm_class(arch).__name__]
    return config


def architecture_of(config: RecurrentConfig) -> str:
    """The folder of the zoo that a configuration belongs to."""
    return str(config.model_type).removeprefix("rnnzoo-")


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """["rope_parameters=null", "qk_norm=true"] -> fields with YAML's values.

    Raises:
        RnnzooError: not of the form field=value.
    """
    fields = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            equals = ""
        if not equals or not name.strip().isidentifier():
            raise RnnzooError(f"{setting!r} is no setting; write --set field=value, such as --set qk_norm=true.")
        fields[name.strip()] = value
    return fields


def _from_file(file: Path) -> tuple[str, dict[str, Any]]:
    file = file / "config.json" if file.is_dir() else file
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RnnzooError(f"There is no configuration {file}; give --config a config.json.") from None
    except (OSError, ValueError) as error:
        raise RnnzooError(f"{file} is not a readable config.json: {error}") from error
    kind = given.get("model_type") if isinstance(given, dict) else None
    if not str(kind).startswith("rnnzoo-"):
        raise RnnzooError(f"{file} has model_type {kind!r}; expected 'rnnzoo-' and the name of an architecture.")
    return str(kind).removeprefix("rnnzoo-"), given


def _refuse_unknown(cls: type[RecurrentConfig], arch: str, given: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    for name in given.get("layer_types") or ():
        own = config_class(name)
        known |= {field.name for field in dataclasses.fields(own)} if own else set()
    # What transformers writes into every config.json besides fields.
    known |= {"model_type", "transformers_version", "architectures", "dtype"}
    for name in given:
        if name not in known:
            raise RnnzooError(f"{_unknown(f'setting of {arch}', name, known)}.")


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    few = sorted(known) if len(known) < 60 else []
    hint = f"near it are {', '.join(near)}" if near else f"known are {', '.join(few)}" if few else ""
    return f"{name!r} is no {what}" + (f"; {hint}" if hint else "")
