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
        theirs, ours: a stream for each row.
    """

    def __init__(self, layers: Any, folder: Path, data: PackedTokens, number: int):
        """At layer `number`, where an earlier run has saved them unless it is the first.

        Args:
            layers: with `skeleton`, `twin_skeleton` and `embedded()`, as the conversion has them.
        """
        from .stages.closed_form import Stream

        self.folder = folder
        models = layers.twin_skeleton, layers.skeleton
        if number:
            saved = read_tensors(self.path(number))
            hidden = saved["theirs"].split(1), saved["ours"].split(1)
            carried = saved["carried"].split(1) if "carried" in saved else [None] * len(data)
        else:
            embeddings = layers.embedded()
            rows = [torch.nn.functional.embedding(row["input_ids"][None], embeddings) for row in _rows(data)]
            hidden = tuple(
                [model.model.enter(row.to(dtype)) for row in rows]
                for model, dtype in zip(models, (layers.job.dtype, torch.float32), strict=True)
            )
            carried = [None] * len(data)
        self.theirs, self.ours = (
            [Stream(h, _context(model, row)) for h, row in zip(parts, _rows(data), strict=True)]
            for model, parts in zip(models, hidden, strict=True)
        )
        for stream, handed_on in zip(self.ours, carried, strict=True):
            stream.carried = handed_on

    def path(self, number: int) -> Path:
        return self.folder / f"streams-{number}.safetensors"

    def save(self, number: int) -> None:
        """In front of layer `number`."""
        tensors = {name: torch.cat([s.hidden for s in getattr(self, name)]) for name in ("theirs", "ours")}
        if self.ours[0].carried is not None:
            tensors["carried"] = torch.cat([s.carried for s in self.ours if s.carried is not None])
        write_tensors(self.path(number), tensors)

    def forget(self, number: int) -> None:
        self.path(number).unlink(missing_ok=True)


def _rows(data: PackedTokens) -> list[dict[str, Tensor]]:
    return [data[i] for i in range(len(data))]


def _context(model: Any, row: dict[str, Tensor]) -> Any:
    seq_ids = row["seq_ids"][None]
    plain = bool((seq_ids == seq_ids[:, :1]).all())
    return model.model.make_context(*seq_ids.shape, seq_ids.device, seq_ids=None if plain else seq_ids)
