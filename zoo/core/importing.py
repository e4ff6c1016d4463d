"""Checkpoints of other implementations into the zoo's format and back, tensor by tensor.

An architecture that has such checkpoints provides `zoo/<name>/importing_<name>.py` with FORMATS, a tuple of `Format`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.errors import RnnzooError
from .configuration import RecurrentConfig
from .files import appearing, expect_free
from .folders import architecture_module, architectures
from .registry import config_class
from .sizes import causal_lm_class

__all__ = [
    "SAME",
    "Format",
    "Rule",
    "expect_fields",
    "export_checkpoint",
    "formats",
    "import_checkpoint",
    "importable",
    "joined",
    "of_type",
    "recognised_format",
    "renamed",
]

# Everything but weights and configuration goes along as it is: tokenizer, chat template, generation settings.
COPIED = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)
SHARD_BYTES = 4 * 2**30
HEAD = "lm_head.weight"

# Fields that most formats have under the same names.
SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "tie_word_embeddings")
SAME += ("pad_token_id", "bos_token_id", "eos_token_id")

# Blocks as most formats have them: Llama's.
PLAIN = {
    "channel_mixer": "mlp",
    "norm_type": "rms",
    "mlp_type": "gated",
    "hidden_act": "silu",
    "embedding_norm": False,
    "embedding_scale": None,
    "logit_cap": None,
    "attention_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "parallel_residual": False,
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some tensors of ours from some of theirs, and the way back.

    Args:
        ours, theirs: names. to_ours: tensors of theirs -> as many tensors as `ours` names. to_theirs: the inverse.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[..., Sequence[Tensor]] = lambda *tensors: tensors
    to_theirs: Callable[..., Sequence[Tensor]] = lambda *tensors: tensors


def renamed(ours: str, theirs: str, names: Iterable[str] | Mapping[str, str]) -> Iterator[Rule]:
    """Rules for tensors that differ in name alone: prefix and, where `names` maps ours to theirs, the rest."""
    pairs = names if isinstance(names, Mapping) else {name: name for name in names}
    for own, their in pairs.items():
        yield Rule((ours + own,), (theirs + their,))


def joined(ours: str, theirs: Sequence[str], sizes: Sequence[int], dim: int = 0) -> Rule:
    """One tensor of ours that is several of theirs, of `sizes` along `dim`, one after the other."""
    return Rule(
        (ours,), tuple(theirs), lambda *parts: (torch.cat(parts, dim),), lambda whole: whole.split(list(sizes), dim)
    )


def expect_fields(config: RecurrentConfig, whose: str, **expected: Any) -> None:
    """Raises RnnzooError if a field of `PLAIN`, or one of `expected`, which goes first, has another value.

    Args:
        whose: the format that knows no other, for the message.
    """
    for name, value in (PLAIN | expected).items():
        if getattr(config, name) != value:
            raise RnnzooError(f"{whose} format has no place for {name}={getattr(config, name)!r}.")


@dataclasses.dataclass(frozen=True)
class Format:
    """How one other implementation keeps the models of an architecture.

    Args:
        name: e.g. "transformers", "fla", "mamba_ssm", "rwkv".
        recognises: (config.json or {}, shapes by tensor name) -> whether a checkpoint is of this format.
        to_ours: the same two -> our configuration; RnnzooError where the architecture cannot do what it asks for.
        to_theirs: our configuration -> their config.json, {} for none; RnnzooError where the format cannot express it.
        rules: our configuration -> the rule of every tensor. `lm_head.weight` must be among them; it is left out where
            the embeddings are tied and the checkpoint has none.
        ignored: regular expression of tensors of theirs that a model does not need.
        file: name of the one file, if the weights are a torch file.
    """

    name: str
    recognises: Callable[[dict, dict[str, tuple[int, ...]]], bool]
    to_ours: Callable[[dict, dict[str, tuple[int, ...]]], RecurrentConfig]
    to_theirs: Callable[[RecurrentConfig], dict[str, Any]]
    rules: Callable[[RecurrentConfig], Iterable[Rule]]
    ignored: str | None = None
    file: str | None = None


def of_type(*kinds: str) -> Callable[[dict, dict[str, tuple[int, ...]]], bool]:
    """`recognises` of a format whose config.json has one of these as its model_type."""
    return lambda config, shapes: config.get("model_type") in kinds


def importable() -> tuple[str, ...]:
    """Architectures that can be imported."""
    zoo = pathlib.Path(__file__).resolve().parent.parent
    return tuple(name for name in architectures() if (zoo / name / f"importing_{name}.py").is_file())


def formats(architecture: str) -> dict[str, Format]:
    """The foreign formats of an architecture, by name.

    Raises:
        RnnzooError: it has none.
    """
    if architecture not in importable():
        raise RnnzooError(f"'{architecture}' has no importer; there is one for {', '.join(importable())}.")
    rules = architecture_module(architecture, "importing")
    return {own.name: own for own in rules.FORMATS}


class Checkpoint:
    """Reads tensors by name, one at a time, from safetensors, or from torch files without running what they hold.

    Args:
        source: a folder, or a `.pth` or `.safetensors` file.
    """

    def __init__(self, source: str | os.PathLike):
        self.source = pathlib.Path(source)
        if not self.source.exists():
            raise RnnzooError(f"{self.source} does not exist; give the folder or the .pth file of a checkpoint.")
        self.folder = self.source if self.source.is_dir() else self.source.parent
        config = self.folder / "config.json"
        if self.source.is_dir() and not config.is_file() and len(alone := sorted(self.source.glob("*.pth"))) == 1:
            self.source = alone[0]  # RWKV's files come without a configuration
        alone = self.source.is_file()
        if not alone and not config.is_file():
            raise RnnzooError(f"{self.source} holds no config.json; give the folder of a checkpoint, or a .pth file.")
        self.config = {} if alone else json.loads(config.read_text(encoding="utf-8"))
        files = [self.source] if alone else self._files()
        self._where: dict[str, Callable[[], Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            self._open(file)

    def _files(self) -> list[pathlib.Path]:
        for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pth"):
            if found := sorted(self.source.glob(pattern)):
                return found
        raise RnnzooError(f"{self.source} holds no *.safetensors, pytorch_model*.bin or *.pth; nothing to import.")

    def _open(self, file: pathlib.Path) -> None:
        try:
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  not a dictionary
                        self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                        self._where[name] = lambda file=file, name=name: _read(file, name)
                return
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise RnnzooError(f"{file} cannot be read as tensors alone: {str(error).splitlines()[0]}") from error
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise RnnzooError(f"{file} holds a {type(tensor).__name__} under '{name}', expected a tensor.")
            self.shapes[name] = tuple(tensor.shape)
            self._where[name] = lambda tensor=tensor: tensor

    def get(self, name: str) -> Tensor:
        """A tensor, read now."""
        return self._where[name]()


def _read(file: pathlib.Path, name: str) -> Tensor:
    with safetensors.safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def import_checkpoint(
    source: str | os.PathLike,
    architecture: str,
    out: str | os.PathLike,
    *,
    format: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:
    """Writes another implementation's checkpoint as a model of the zoo into `out`.

    Args:
        source: a folder with config.json or one `.pth` file, or such a file. architecture: folder of the zoo.
        format: its name; None: recognised. shard_bytes: of a file of `out`; about as much is in memory at a time.

    `out` appears only when it is complete. Tensors keep their dtype; tokenizer and generation settings go along.

    Raises:
        RnnzooError: unknown architecture, missing or foreign files, tensors that have no place or are not there, or
            `out` exists and is not empty.
    """
    known = formats(architecture)
    expect_free(out)
    checkpoint = Checkpoint(source)
    own = _recognised(checkpoint, known) if format is None else known.get(format)
    if own is None:
        kind = checkpoint.config.get("model_type")
        what = f"Expected a checkpoint of {architecture}" if format is None else f"'{format}' is no known format"
        raise RnnzooError(f"{what}; got model_type {kind!r} in {checkpoint.source}. Known formats: {', '.join(known)}.")
    config = own.to_ours(checkpoint.config, checkpoint.shapes)
    cls = causal_lm_class(architecture)
    config.architectures = [cls.__name__]
    rules = _without_tied_head(own.rules(config), config, checkpoint.shapes)
    _check_names(
        rules, [rule.theirs for rule in rules], checkpoint.shapes, f"the checkpoint {checkpoint.source}", own.ignored
    )
    with torch.device("meta"):
        expected = {name: tuple(x.shape) for name, x in cls(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(HEAD, None)
    _check_names(rules, [rule.ours for rule in rules], expected, f"a {architecture} model of this configuration", None)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for rule in rules:
            for name, x in zip(rule.ours, rule.to_ours(*map(checkpoint.get, rule.theirs)), strict=True):
                if name in expected and tuple(x.shape) != expected[name]:
                    raise RnnzooError(f"{name}: the checkpoint has shape {tuple(x.shape)}, expected {expected[name]}.")
                if name in expected:
                    yield name, x

    dtype = checkpoint.get(rules[0].theirs[0]).dtype
    config.dtype = str(dtype).removeprefix("torch.")
    with appearing(out) as folder:
        _write_shards(tensors(), folder, shard_bytes)
        config.save_pretrained(folder)
        if pathlib.Path(source).is_dir():
            _copy_along(checkpoint.folder, folder)
    return pathlib.Path(out)


def recognised_format(source: str | os.PathLike, architecture: str) -> str | None:
    """The name of the format that a checkpoint is in; None: none of the architecture's."""
    own = _recognised(Checkpoint(source), formats(architecture))
    return None if own is None else own.name


def _recognised(checkpoint: Checkpoint, known: Mapping[str, Format]) -> Format | None:
    return next((own for own in known.values() if own.recognises(checkpoint.config, checkpoint.shapes)), None)


def export_checkpoint(
    source: str | os.PathLike, format: str, out: str | os.PathLike, *, shard_bytes: int = SHARD_BYTES
) -> pathlib.Path:
    """Writes a model of the zoo as another implementation's checkpoint into the folder `out`: the inverse of importing.

    Raises:
        RnnzooError: no model of the zoo, no such format for its architecture, a configuration that the format cannot
            express, or `out` exists and is not empty.
    """
    expect_free(out)
    checkpoint = Checkpoint(source)
    kind = str(checkpoint.config.get("model_type"))
    architecture = kind.removeprefix("rnnzoo-")
    if architecture == kind:
        raise RnnzooError(f"{source} has model_type '{kind}', which is no model of the zoo.")
    known = formats(architecture)
    if format not in known:
        raise RnnzooError(f"'{format}' is no format of {architecture}; known are {', '.join(known)}.")
    own, cls = known[format], config_class(architecture)
    assert cls is not None
    config = cls.from_pretrained(source)
    theirs = own.to_theirs(config)
    rules = _without_tied_head(own.rules(config), config, checkpoint.shapes, ours=True)
    _check_names(rules, [rule.ours for rule in rules], checkpoint.shapes, f"the model {source}", None)
    tensors = (
        (name, x.contiguous())
        for rule in rules
        for name, x in zip(rule.theirs, rule.to_theirs(*map(checkpoint.get, rule.ours)), strict=True)
    )
    with appearing(out) as folder:
        if own.file is not None:
            torch.save(dict(tensors), folder / own.file)
        else:
            _write_shards(tensors, folder, shard_bytes)
        if theirs:
            (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
        _copy_along(checkpoint.folder, folder)
    return pathlib.Path(out)


def _without_tied_head(
    rules: Iterable[Rule], config: RecurrentConfig, shapes: Mapping[str, Any], ours: bool = False
) -> list[Rule]:
    """Leaves out the rule of the head where it is tied and the files at hand do not have it."""

    def there(rule: Rule) -> bool:
        return all(name in shapes for name in (rule.ours if ours else rule.theirs))

    return [rule for rule in rules if HEAD not in rule.ours or not config.tie_word_embeddings or there(rule)]


def _check_names(
    rules: list[Rule], used: list[tuple[str, ...]], have: Mapping[str, Any], where: str, ignored: str | None
) -> None:
    names = {name for group in used for name in group}
    extra = {HEAD} if not any(HEAD in rule.ours for rule in rules) else set()
    missing = sorted(names - set(have) - {HEAD})
    unmapped = sorted(name for name in set(have) - names - extra if not (ignored and re.search(ignored, name)))
    problems = [
        f"{what}: {', '.join(found[:20])}{f' and {len(found) - 20} more' if len(found) > 20 else ''}"
        for what, found in (("missing", missing), ("without a place", unmapped))
        if found
    ]
    if problems:
        raise RnnzooError(f"The tensors of {where} do not fit; {'; '.join(problems)}.")


def _copy_along(source: pathlib.Path, folder: pathlib.Path) -> None:
    for pattern in COPIED:
        for file in source.glob(pattern):
            shutil.copy2(file, folder)


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: pathlib.Path, shard_bytes: int) -> None:
    """safetensors files of at most `shard_bytes` (or one tensor), and their index where there are several."""
    where: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    size = total = count = 0

    def flush() -> None:
        nonlocal shard, size, count
        save_file(shard, folder / f"{count}.part", metadata={"format": "pt"})
        shard, size, count = {}, 0, count + 1

    for name, x in tensors:
        own = x.numel() * x.element_size()
        if shard and size + own > shard_bytes:
            flush()
        # A copy of its own: a part of a larger tensor would be written with all of it.
        shard[name] = x.clone(memory_format=torch.contiguous_format)
        where[name], size, total = count, size + own, total + own
    flush()
    if count == 1:
        os.replace(folder / "0.part", folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, name in enumerate(files):
        os.replace(folder / f"{i}.part", folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: files[i] for name, i in sorted(where.items())}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
