"""What `--offload` keeps on disk between two layers: mixers, and the hidden states of rows of text in front of a layer.

Everything appears whole or not at all, under the number of the layer that it stands in front of.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .data import PackedTokens

__all__ = ["HiddenFiles", "SmallStreams", "read_tensors", "write_tensors"]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def write_tensors(path: Path, tensors: dict[str, Tensor], report: dict[str, Any] | None = None) -> None:
    """A safetensors file, whole or not there at all; `report` goes into its header."""
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".part")
    about = {"format": "pt"} | ({"report": json.dumps(report)} if report else {})
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, metadata=about)
    os.replace(partial, path)


class HiddenFiles:
    """Hidden states (N, T, D) of many rows in front of a layer, mapped: what is not at work need not be in memory."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype):
        self.folder, self.shape, self.dtype = folder, shape, dtype

    def path(self, number: int) -> Path:
        return self.folder / f"hidden-{number}.bin"

    def of(self, number: int) -> Tensor:
        """Those in front of layer `number`."""
        return self._map(self.path(number))

    @contextlib.contextmanager
    def new(self, number: int) -> Iterator[Tensor]:
        """To be written within the block; they count when it has ended well."""
        partial = self.path(number).with_suffix(".part")
        partial.unlink(missing_ok=True)
        yield self._map(partial)
        os.replace(partial, self.path(number))

    def forget(self, number: int) -> None:
        self.path(number).unlink(missing_ok=True)

    def _map(self, path: Path) -> Tensor:
        rows, time, width = self.shape
        flat = torch.from_file(str(path), shared=True, size=rows * time * width, dtype=self.dtype)
        return flat.view(self.shape)


class SmallStreams:
    """The few rows of calibration text on their way through teacher and student, in memory.

    Attributes:
        theirs, ours: a stream for each row that is fitted, in teacher and student.
        judged, unfitted: for each row that judges the fit, in the student and in one whose layers are not fitted.
    """

    NAMES = ("theirs", "ours", "judged", "unfitted")

    def __init__(self, layers: Any, folder: Path, fitted: PackedTokens, judged: PackedTokens, number: int):
        """At layer `number`, where an earlier run has saved them unless it is the first.

        Args:
            layers: with `skeleton`, `twin_skeleton` and `embedded()`, as the conversion has them.
        """
        from .fit.closed_form import Stream

        self.folder = folder
        self.theirs: list[Stream] = []
        self.ours: list[Stream] = []
        self.judged: list[Stream] = []
        self.unfitted: list[Stream] = []
        saved = read_tensors(self.path(number)) if number else None
        embeddings = None if number else layers.embedded()
        for name in self.NAMES:
            data = fitted if name in ("theirs", "ours") else judged
            model = layers.twin_skeleton if name == "theirs" else layers.skeleton
            for i in range(len(data)):
                ctx = _context(model, data[i])
                if saved is not None:
                    carried = saved[f"{name}.carried"][i : i + 1] if f"{name}.carried" in saved else None
                    stream = Stream(saved[name][i : i + 1], ctx, carried)
                else:
                    embedded = torch.nn.functional.embedding(data[i]["input_ids"][None], embeddings)
                    dtype = layers.context.dtype if name == "theirs" else torch.float32
                    stream = Stream(model.model.enter(embedded.to(dtype)), ctx)
                getattr(self, name).append(stream)

    def path(self, number: int) -> Path:
        return self.folder / f"streams-{number}.safetensors"

    def save(self, number: int) -> None:
        """In front of layer `number`."""
        tensors = {}
        for name in self.NAMES:
            streams = getattr(self, name)
            tensors[name] = torch.cat([stream.hidden for stream in streams])
            if streams[0].carried is not None:
                tensors[f"{name}.carried"] = torch.cat([stream.carried for stream in streams])
        write_tensors(self.path(number), tensors)

    def forget(self, number: int) -> None:
        self.path(number).unlink(missing_ok=True)


def _context(model: Any, row: dict[str, Tensor]) -> Any:
    seq_ids = row["seq_ids"][None]
    plain = bool((seq_ids == seq_ids[:, :1]).all())
    return model.model.make_context(*seq_ids.shape, seq_ids.device, seq_ids=None if plain else seq_ids)
