"""From what a user calls a teacher to a `TeacherRef`: found, checked, identified, but with no weights read."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ...kernels.errors import RnnzooError
from ...kernels.files import check_safetensors, read_object
from . import embedded
from .card import stated_in_card
from .families import FAMILIES, Family, count_parameters, family_of
from .files import content_hash, hub_reachable, quiet_loading, user_errors
from .generation import generation_settings
from .gguf import gguf_config, gguf_family, load_gguf_weights, read_gguf_header
from .tokenizer import first_line, folder_tokenizer, gguf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["TeacherRef", "resolve_teacher"]

HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]


@dataclass(frozen=True)
class TeacherRef:
    """A teacher that was found.

    Attributes:
        name: what to call it in results: the Hub id, the folder's or file's name, or the embedded model's name.
        kind: where it comes from.
        path: the folder with config.json, or the folder of the GGUF file. For kind "embedded" it exists after
            `fetch()`.
        gguf_file: the file's name inside `path` (kind "gguf" only).
        config: transformers' config of the plain, unquantised architecture.
        sha: a commit for kind "hub", else "sha256:..." (of a sample of the blocks above 2 GiB: "sampled-sha256:...").
        licence: as the source states it, for example "apache-2.0"; None if it says nothing.
        family: the adapter.
        base_model: a Hub id for the model card, if known.
        revision: as asked for (kind "hub").
        card: what else its own card says: derived_from, citation, language, licence_name.
    """

    name: str
    kind: Literal["hub", "folder", "gguf", "embedded"]
    path: Path
    gguf_file: str | None
    config: PreTrainedConfig
    sha: str
    licence: str | None
    family: Family
    base_model: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    card: dict[str, Any] = field(default_factory=dict, compare=False)

    @functools.cached_property
    def parameters(self) -> int:
        """The number of parameters, from the config."""
        return count_parameters(self.family, self.config)

    def record(self) -> dict[str, Any]:
        """What results.json says of it."""
        names = ("name", "kind", "sha", "licence", "base_model", "parameters", "revision")
        return {name: getattr(self, name) for name in names} | {k: v for k, v in self.card.items() if k != "licence"}

    def fetch(self) -> Path:
        """Downloads what `load` needs (kinds "hub" and "embedded"); returns the folder.

        Raises:
            RnnzooError: no network, no space, no permission, a checksum that differs, damaged weights.
        """
        if self.kind == "embedded":
            return embedded.fetch_embedded()
        if self.kind == "hub":
            return _fetch_hub(self)
        return self.path

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole model on the CPU, in eval mode: a plain architecture that saves and reloads.

        Raises:
            RnnzooError: as `fetch`, and for weights that do not fit the config.
        """
        folder = self.fetch()
        with user_errors(f"The teacher {self.name} cannot be loaded"):
            if self.gguf_file:
                return load_gguf_weights(read_gguf_header(folder / self.gguf_file), self.family, self.config, dtype)
            return _load_folder(folder, self, dtype)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The teacher's tokenizer with its chat template; pad token set, model_max_length the teacher's positions."""
        folder = self.fetch()
        if self.gguf_file:
            return gguf_tokenizer(folder / self.gguf_file, self.config)
        return folder_tokenizer(folder, self.config, local_files_only=True)

    def generation(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """What a student's generation_config.json says; see `generation_settings`."""
        return generation_settings(self.fetch(), self.config, tokenizer)


def resolve_teacher(
    name: str | None, *, revision: str | None = None, cache_dir: str | None = None, weights: bool = True
) -> TeacherRef:
    """Finds a teacher and reads its config; of the weights only file headers.

    Args:
        name: a folder, a path that ends in .gguf, a Hub id ("owner/model"), or None or "embedded" for the built-in one.
        revision: branch, tag or commit of a Hub id.
        cache_dir: the Hub's cache, if not the usual one.
        weights: False takes a folder with config.json alone as well, for questions that its sizes answer.
    Raises:
        RnnzooError: not found, not reachable, damaged, or not a causal decoder of a supported family.
    """
    if name is None or name == "embedded":
        return _embedded()
    path = Path(name).expanduser()
    with user_errors(f"The teacher {name} cannot be read"):
        if path.is_dir():
            return _folder(path, weights)
        if path.suffix.lower() == ".gguf":
            return _gguf(path)
        if path.is_file():
            raise RnnzooError(
                f"{name} is a file but not a .gguf file; give the model's folder, a GGUF file or a Hub id."
            )
        if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise RnnzooError(f"There is no folder {name}; give an existing folder, a GGUF file or a Hub id.")
        return _hub(name, revision, cache_dir)


def _embedded() -> TeacherRef:
    return TeacherRef(
        name=embedded.NAME,
        kind="embedded",
        path=embedded.embedded_folder(),
        gguf_file=None,
        config=embedded.embedded_config(),
        sha=f"sha256:{embedded.GGUF_SHA256}",
        licence=embedded.LICENCE,
        family=FAMILIES["llama"],
        base_model=embedded.HUB_ID,
    )


def _gguf(path: Path) -> TeacherRef:
    header = read_gguf_header(path)
    family = gguf_family(header)
    config = gguf_config(header, family)
    licence = header.metadata.get("general.license")
    sha = content_hash([path])
    return TeacherRef(path.stem, "gguf", path.parent.resolve(), path.name, config, sha, licence, family)


def _folder(path: Path, weights: bool) -> TeacherRef:
    family, config = _read_config(path, str(path))
    files = _weight_files(path) if weights or any(path.glob("model*.safetensors*")) else []
    sha = content_hash([path / "config.json", *files])
    name = path.resolve().name
    card = stated_in_card(path)
    return TeacherRef(name, "folder", path.resolve(), None, config, sha, card.get("licence"), family, card=card)


def _read_config(folder: Path, source: str) -> tuple[Family, PreTrainedConfig]:
    file = folder / "config.json"
    if not file.is_file():
        raise RnnzooError(
            f"{source} has no config.json, so it is not a model folder; give a folder, GGUF file or Hub id."
        )
    raw = read_object(file, "download the model again")
    family = family_of(raw, source)
    try:
        return family, family.config_class.from_pretrained(folder)
    except Exception as error:  # transformers' validation raises many kinds
        raise RnnzooError(f"{file} is not a valid {family.model_type} config: {first_line(error)}") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise RnnzooError(f"{index} is damaged; download the model again.") from error
        files = [folder / shard for shard in names]
    else:
        files = [folder / "model.safetensors"]
        if not files[0].exists():
            raise RnnzooError(
                f"{folder} has no model.safetensors; save the model with `save_pretrained` (safetensors)."
            )
    for file in files:
        check_safetensors(file)
    return files


def _hub(name: str, revision: str | None, cache_dir: str | None) -> TeacherRef:
    from huggingface_hub import hf_hub_download

    offline = not hub_reachable()
    options: dict[str, Any] = dict(revision=revision, cache_dir=cache_dir, local_files_only=offline)
    file = Path(_from_hub(name, offline, functools.partial(hf_hub_download, name, "config.json", **options)))
    family, config = _read_config(file.parent, name)
    card: dict[str, Any] = {}
    with contextlib.suppress(OSError):  # no card, or not in the cache: the licence is then unknown
        card = stated_in_card(Path(hf_hub_download(name, "README.md", **options)).parent)
    sha, licence = file.parent.name, card.get("licence")
    return TeacherRef(name, "hub", file.parent, None, config, sha, licence, family, name, revision, cache_dir, card)


def _fetch_hub(ref: TeacherRef) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, "*.safetensors"]
    get = functools.partial(
        snapshot_download, ref.name, revision=ref.sha, cache_dir=ref.cache_dir, allow_patterns=patterns
    )
    with user_errors(f"The teacher {ref.name} cannot be downloaded"), quiet_loading():
        try:
            folder = Path(get(local_files_only=True))
            _weight_files(folder)
        except (OSError, RnnzooError):  # not, or not wholly, in the cache
            offline = not hub_reachable()
            folder = Path(_from_hub(ref.name, offline, functools.partial(get, local_files_only=offline)))
            _weight_files(folder)
    return folder


def _from_hub(name: str, offline: bool, get: Any) -> Any:
    """Calls a download and turns the Hub's errors into sentences."""
    from huggingface_hub import errors

    try:
        return get()
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.EntryNotFoundError) as error:
        why = "HF_HUB_OFFLINE is set" if _offline_by_choice() else "the Hub cannot be reached"
        why = why if offline else "the Hub did not answer"
        sentences = {  # the first that fits: some are kinds of later ones
            errors.HFValidationError: f"There is no folder {name}, and it cannot be a Hub id: {first_line(error)}",
            errors.GatedRepoError: f"{name} is gated: accept its terms on the Hub and log in with `hf auth login`.",
            errors.RepositoryNotFoundError: f"There is no model {name} on the Hub (or it is private: `hf auth login`).",
            errors.RevisionNotFoundError: f"{name} has no such revision on the Hub; check --revision.",
            errors.LocalEntryNotFoundError: f"There is no folder {name}, and as a Hub id it is not in the cache while "
            f"{why}; connect once, or give a folder or GGUF file.",
            errors.EntryNotFoundError: f"{name} on the Hub lacks a file that a model has (config.json).",
            errors.HfHubHTTPError: f"The Hub refused {name}: {first_line(error)}",
        }
        raise RnnzooError(next(said for kind, said in sentences.items() if isinstance(error, kind))) from error


def _offline_by_choice() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _load_folder(folder: Path, ref: TeacherRef, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with quiet_loading():
            loaded: Any = ref.family.model_class.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        model, info = loaded
    except (RuntimeError, ValueError, KeyError) as error:
        raise RnnzooError(f"The weights in {folder} do not fit its config.json: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise RnnzooError(
            f"The weights in {folder} lack {len(missing)} tensors that a {ref.family.model_type} language model has, "
            f"{missing[0]} for one; save the whole model ({ref.family.model_name})."
        )
    return model.eval()
