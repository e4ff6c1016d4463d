"""A teacher that stays on disk: safetensors files are mapped, and only the layer at work has its pages in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels.errors import RnnzooError
from ..zoo.core.model import RecurrentBlock

if TYPE_CHECKING:
    from ..zoo.core.configuration import RecurrentConfig
    from ..zoo.core.mixer import AttentionWeights
    from .teachers import TeacherRef

__all__ = ["MappedTeacher", "block_of"]

STORED = {"lm_head.weight": "embed_out.weight"}  # names in the files of GPT-NeoX, where they are not the model's


class MappedTeacher:
    """Layers of a teacher one at a time; what is returned is mapped, so that letting go of it frees its memory.

    Raises:
        RnnzooError: a GGUF file, whose tensors have to be unpacked, or weights that are not there.
    """

    def __init__(self, teacher: TeacherRef):
        if teacher.gguf_file:
            raise RnnzooError(
                f"--offload maps the teacher's weights, which a GGUF file ({teacher.gguf_file}) does not allow; give a "
                "folder with safetensors."
            )
        self.family, self.name = teacher.family, teacher.name
        self.files = _files_of_tensors(teacher.fetch())
        self.stored = {ours: theirs for ours, theirs in STORED.items() if ours not in self.files}
        with torch.device("meta"):
            self.model = teacher.family.model_class(teacher.config)
        self.paths = {id(module): path for path, module in self.model.named_modules()}

    def layer(self, number: int) -> tuple[AttentionWeights, dict[str, Tensor]]:
        """The attention of a layer, and its other tensors under the names that they have in a student's block."""
        block = self.family.layers(self.model)[number]
        prefix = self.paths[id(block)] + "."
        self._fill(block, prefix)
        ours = f"model.layers.{number}."
        shared = self.family.shared_tensors(self.model)
        weights = self.family.attention_weights(self.model, number)
        block.to_empty(device="meta")
        return weights, {name.removeprefix(ours): tensor for name, tensor in shared.items() if name.startswith(ours)}

    def ends(self) -> dict[str, Tensor]:
        """Embeddings, final norm and head, under a student's names; a tied head is left out."""
        outside = [name for name, _ in self.model.named_parameters() if not self._in_a_layer(name)]
        tied = self.model.config.tie_word_embeddings
        wanted = [name for name in outside if not (tied and name == "lm_head.weight")]
        tensors = self._read(wanted)
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
        found = {name: t for name, t in self.family.shared_tensors(self.model).items() if ".layers." not in name}
        for path in {name.rpartition(".")[0] for name in tensors}:
            self.model.get_submodule(path).to_empty(device="meta")
        return found

    def _in_a_layer(self, name: str) -> bool:
        first = self.paths[id(self.family.layers(self.model)[0])].rpartition(".")[0]
        return name.startswith(first + ".")

    def _fill(self, block: nn.Module, prefix: str) -> None:
        names = [prefix + name for name, _ in block.named_parameters()]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self._read(names).items()}
        block.load_state_dict(tensors, strict=False, assign=True)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        from safetensors import safe_open

        found: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        ours = {self.stored.get(name, name): name for name in names}
        for name in ours:
            if name not in self.files:
                raise RnnzooError(f"The weights of {self.name} lack the tensor {name}; save the whole model again.")
            by_file.setdefault(self.files[name], []).append(name)
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as file:
                found |= {ours[name]: file.get_tensor(name) for name in wanted}
        return found


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / "model.safetensors")


def block_of(
    config: RecurrentConfig,
    number: int,
    mixer: nn.Module,
    shared: dict[str, Tensor],
    dtype: torch.dtype,
    norms: torch.dtype,
) -> RecurrentBlock:
    """A whole block, frozen: this mixer, and the teacher's norms and MLP, which stays mapped if it is of `dtype`."""
    with torch.device("meta"):
        block = RecurrentBlock(config, number)
    block.mixer = mixer  # type: ignore[assignment]
    tensors = {name: tensor.to(norms if "norm" in name else dtype) for name, tensor in shared.items()}
    block.load_state_dict(tensors, strict=False, assign=True)
    return block.requires_grad_(False).eval()
