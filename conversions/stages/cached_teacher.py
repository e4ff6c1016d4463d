"""The teacher's likeliest tokens for every row of a stage, written once, so that training does not run the teacher.

    RUN/<stage>/teacher/00000.safetensors     indices (n, T, K) int32; log_probabilities (n, T, K), log_rest (n, T)

Shards appear under their names when they are whole; a run that goes on makes those that are missing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ..context import StageContext, StageRun
from ..data import PackedTokens
from ..teachers.files import user_errors
from .distilled import Distilled, teacher_model_of

__all__ = ["FOLDER", "CachedRows", "cached_rows", "likeliest", "repeated", "write_shards"]

FOLDER = "teacher"  # in the stage's; forgotten when the stage is finished
SHARD_BYTES = 1 << 26


class CachedRows(Dataset):
    """Rows with the teacher's predictions: `input_ids`, `seq_ids`, and the three tensors of a shard, a row of each."""

    def __init__(self, rows: PackedTokens, folder: Path, per_shard: int):
        self.rows, self.folder, self.per_shard = rows, folder, per_shard
        self.seq_len = rows.seq_len
        self.open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, place = divmod(int(index), self.per_shard)
        if number not in self.open:
            self.open[number] = safe_open(_shard(self.folder, number), framework="pt")
        kept = {name: self.open[number].get_slice(name)[place] for name in _NAMES}
        return self.rows[index] | kept


_NAMES = ("indices", "log_probabilities", "log_rest")


class _Repeated(Dataset):
    def __init__(self, rows: Any, order: Tensor):
        self.rows, self.order, self.seq_len = rows, order, rows.seq_len

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[int(self.order[index])]


def repeated(rows: Any, count: int, seed: int) -> Any:
    """`count` rows: all in their order, then all again in another order, and so on."""
    if count == len(rows):
        return rows
    generator = torch.Generator().manual_seed(seed)
    order = [torch.arange(len(rows))]
    while sum(map(len, order)) < count:
        order.append(torch.randperm(len(rows), generator=generator))
    return _Repeated(rows, torch.cat(order)[:count])


def cached_rows(
    context: StageContext, stage: Distilled, top: int, stage_run: StageRun, rows: PackedTokens
) -> tuple[CachedRows, dict[str, Any]]:
    """The rows with the `top` predictions, made where they are missing; and what the stage reports of that."""
    folder = context.folder / stage_run.name / FOLDER
    report = lambda done, total: context.progress(f"{stage_run.name}, teacher", done, total, {})  # noqa: E731
    vocabulary = context.teacher.config.vocab_size  # another teacher's head may have unused rows after these
    per_shard = write_shards(lambda: teacher_model_of(context, stage), rows, top, folder, report, vocabulary)
    files = sorted(folder.glob("*.safetensors"))
    seconds = 0.0
    for file in files:
        with safe_open(file, framework="pt") as shard:
            seconds += float(shard.metadata()["seconds"])
    about = {"teacher_seconds": round(seconds, 1), "teacher_bytes": sum(file.stat().st_size for file in files)}
    return CachedRows(rows, folder, per_shard), about


def write_shards(
    teacher_model: Callable[[], Any],
    rows: PackedTokens,
    top: int,
    folder: Path,
    progress: Callable[[int, int], None],
    vocabulary: int,
) -> int:
    """Writes the shards that are missing, dealt out to the processes; returns the rows of a shard.

    Args:
        teacher_model: gives the teacher, if it is needed. top: K. progress: called with (tokens so far, tokens in all).
        vocabulary: V, tokens of the teacher's head that count.
    """
    state = PartialState()
    per_shard = max(1, SHARD_BYTES // (rows.seq_len * (8 * top + 4)))
    count = -(-len(rows) // per_shard)
    missing = [number for number in range(count) if not _shard(folder, number).exists()]
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        folder.mkdir(parents=True, exist_ok=True)
        teacher = teacher_model().to(state.device)
        for done, number in enumerate(mine):
            progress(done * per_shard * rows.seq_len, len(mine) * per_shard * rows.seq_len)
            numbers = range(number * per_shard, min(len(rows), (number + 1) * per_shard))
            _write_shard(teacher, rows, numbers, top, _shard(folder, number), vocabulary)
        teacher.cpu()
    state.wait_for_everyone()
    return per_shard


def _write_shard(teacher: Any, rows: PackedTokens, numbers: range, top: int, path: Path, vocabulary: int) -> None:
    started = time.monotonic()
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    weight = teacher.lm_head.weight[:vocabulary]
    device = weight.device
    for number in numbers:
        row = rows[number]
        seq_ids = None if bool((row["seq_ids"] == row["seq_ids"][0]).all()) else row["seq_ids"][None].to(device)
        with torch.no_grad():
            outputs = teacher.model(input_ids=row["input_ids"][None].to(device), seq_ids=seq_ids, use_cache=False)
            kept.append(likeliest(outputs.last_hidden_state[0], weight, top))
    tensors = {name: torch.stack(parts).cpu() for name, parts in zip(_NAMES, zip(*kept, strict=True), strict=True)}
    partial = path.with_name(f"{path.name}.partial")
    with user_errors(f"The teacher's predictions cannot be saved to {path}"):
        try:
            save_file(tensors, partial, metadata={"seconds": f"{time.monotonic() - started:.3f}"})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def likeliest(hidden: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """From final hidden states (T, D) and a head (V, D): tokens (T, K), log-probabilities (T, K), the rest's (T,)."""
    parts = []
    for part in hidden.split(256):
        log_probabilities = (part @ weight.T).float().log_softmax(-1)
        kept, indices = log_probabilities.topk(top, -1)
        # Summed over the others: 1 minus the kept mass would be noise where it is nearly 1.
        rest = log_probabilities.scatter(1, indices, -torch.inf).logsumexp(-1)
        parts.append((indices.to(torch.int32), kept, rest))
    indices, kept, rest = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return indices, kept, rest


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.safetensors"
