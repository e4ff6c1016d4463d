"""`convert --offload`: one layer in memory at a time, so that the model may be many times as large as the memory.

    OUT/.rnnzoo/layers/<stage>/mixer-<i>.safetensors     the mixer of layer i after the stage
    OUT/.rnnzoo/layers/<stage>/unfitted-<i>.safetensors  before its fit in closed form, which may be taken back
    OUT/.rnnzoo/layers/<stage>/streams-<i>.safetensors   the few rows of `calibrate` before layer i
    OUT/.rnnzoo/layers/<stage>/hidden-<i>.bin            the rows of `align` before layer i, in the teacher, mapped
    OUT/.rnnzoo/layers/<stage>/layer-<i>/                checkpoints of layer i's training

A stage takes rows of text through the layers one after the other: it reads the teacher's layer from its mapped files
and the layer's mixer from the stage before, works on the mixer, writes it and the hidden states behind the layer, and
lets go of the layer. Killed, it goes on with the layer at which it was. Everything appears whole or not at all.

N rows of T tokens, D hidden_size.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..zoo.core.heads import RecurrentForCausalLM
from ..zoo.core.model import RecurrentBlock
from ..zoo.core.registry import mixer_class
from ..zoo.core.rotary import RotaryFrequencies
from ..zoo.core.sizes import causal_lm_class
from .context import StageContext
from .data import PackedTokens
from .fit.closed_form import Stream, context_of
from .layers import Group, Layers, Streams, StudentOnDisk
from .mapped import MappedTeacher, block_of
from .memory import return_freed_memory
from .precision import mixed_precision
from .run_folder import FINISHED, GENERATION, Run, write_json
from .student import layer_types, new_mixer, student_config, teacher_zoo_config

__all__ = ["MappedLayers", "MappedStudent", "MappedStudents"]


class MappedStudent(StudentOnDisk):
    """A student on disk, as the stage `stage` left it, and its teacher.

    Args:
        kept: layers that are attention.
    """

    def __init__(self, context: StageContext, kept: list[int], stage: str = "initialise"):
        self.context, self.stage = context, stage
        self.teacher, self.folder = MappedTeacher(context.teacher), context.folder / "layers"
        config = student_config(context.teacher, context.recipe, layer_types(context.teacher, context.recipe, kept))
        self.student_model = _without_weights(config, context.recipe.student)
        self.teacher_model = _without_weights(teacher_zoo_config(context.teacher), "full_attention")
        self.config, self.count = config, config.num_hidden_layers

    def after(self, stage: str) -> MappedStudent:
        """The same student after another stage."""
        other = copy.copy(self)
        other.stage = stage
        return other

    def layers(self, stage: str) -> MappedLayers:
        return MappedLayers(self, stage)

    def mixer_file(self, number: int) -> Path:
        return self.folder / self.stage / f"mixer-{number}.safetensors"

    def finished(self) -> int:
        """Layers with which the stage is done."""
        self.mixer_file(0).parent.mkdir(parents=True, exist_ok=True)
        return next((i for i in range(self.count) if not self.mixer_file(i).exists()), self.count)

    def initialise(self) -> None:
        """Starts every mixer from the teacher's attention."""
        for number in range(self.finished(), self.count):
            weights, _ = self.teacher.layer(number)
            mixer = new_mixer(self.student_model, number, weights, self.context.seed)
            _write(self.mixer_file(number), mixer.state_dict())
            self.context.progress("initialise", number + 1, self.count, {})

    def pair(self, number: int) -> tuple[RecurrentBlock, RecurrentBlock]:
        """The blocks of teacher and student; of the student's only the MLP is in the dtype to compute in."""
        dtype = self.context.compute_dtype
        weights, shared = self.teacher.layer(number)
        attention = mixer_class(self.teacher_model.config.layer_types[number])(self.teacher_model.config, number)
        attention.init_from_attention(weights)
        teacher_block = block_of(self.teacher_model.config, number, attention.to(dtype), shared, dtype, dtype)
        mixer = mixer_class(self.config.layer_types[number])(self.config, number)
        mixer.load_state_dict(_read(self.mixer_file(number)))
        return teacher_block, block_of(self.config, number, mixer, shared, dtype, torch.float32)

    def publish(self, run: Run) -> None:
        """The finished model, a file a layer, into OUT."""
        whole, dtype = run.folder / "model", self.context.dtype
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        where: dict[str, str] = {}
        size = 0
        for number in range(self.count + 1):
            if number == self.count:
                tensors = self.teacher.ends()
            else:
                prefix = f"model.layers.{number}."
                tensors = {prefix + name: tensor for name, tensor in self.teacher.layer(number)[1].items()}
                tensors |= {f"{prefix}mixer.{name}": t for name, t in _read(self.mixer_file(number)).items()}
            tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
            file = f"model-{number + 1:05d}-of-{self.count + 1:05d}.safetensors"
            _write(whole / file, tensors)
            where |= dict.fromkeys(tensors, file)
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            del tensors
            return_freed_memory()
        write_json(whole / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
        self.config.dtype = dtype
        self.config.save_pretrained(whole)
        write_json(whole / GENERATION, self.context.generation)
        self.context.tokenizer.save_pretrained(whole)
        run.publish_folder(whole)


class MappedStudents:
    """Where a pipeline keeps the student between stages: on disk; as `pipeline.WholeStudents`."""

    def __init__(self, run: Run, context: StageContext):
        self.run, self.context = run, context

    def begin(self, previous: Any, kept: list[int]) -> MappedStudent:
        student = MappedStudent(self.context, kept)
        student.initialise()
        return student

    def saved(self) -> MappedStudent | None:
        if not self.run.stages:
            return None
        return MappedStudent(self.context, self.run.stages[0]["kept"], self.run.stages[-1]["name"])

    def finish(self, name: str, student: MappedStudent, report: dict[str, Any]) -> None:
        self.run.finish(name, None, report)
        for folder in student.folder.iterdir():
            if folder.name != name:
                shutil.rmtree(folder)

    def publish(self, student: MappedStudent) -> None:
        student.publish(self.run)
        self.run.finish(FINISHED, None, {})
        shutil.rmtree(student.folder)


class MappedLayers(Layers):
    """Of a student on disk and its teacher, in a stage that begins where `before` ends."""

    def __init__(self, before: MappedStudent, stage: str):
        self.before, self.student = before, before.after(stage)
        self.student_model, self.teacher_model = before.student_model, before.teacher_model
        self.folder, self.dtype = before.folder / stage, before.context.compute_dtype
        self.first = self.student.finished()

    def streams(self, rows: dict[str, tuple[bool, list[dict[str, Tensor]]]]) -> Streams:
        rows = {name: given for name, given in rows.items() if given[1]}
        saved = _read(self._file("streams", self.first)) if self.first else {}
        if not rows.keys() <= saved.keys():
            saved, self.first = {}, 0  # at the beginning, or of a version that followed other rows
            shutil.rmtree(self.folder)
            self.student.finished()
        found: Streams = defaultdict(list)
        with self._filled(self.teacher_model, self.dtype), self._filled(self.student_model, torch.float32):
            for name, (taught, given) in rows.items():
                model, dtype = (self.teacher_model, self.dtype) if taught else (self.student_model, torch.float32)
                found[name] = [Stream.of(model, row, dtype) for row in given]
        for name in found:
            for i, stream in enumerate(found[name] if saved else ()):
                stream.hidden = saved[name][i : i + 1].to(stream.hidden.dtype)  # a machine before may have had another
                carried = saved[f"{name}.carried"][i : i + 1] if f"{name}.carried" in saved else None
                stream.carried = carried.float() if carried is not None and self.dtype == torch.float32 else carried
        return found

    @contextlib.contextmanager
    def pair(self, number: int) -> Iterator[tuple[RecurrentBlock, RecurrentBlock]]:
        yield self.before.pair(number)
        return_freed_memory()

    def set_aside(self, number: int, block: RecurrentBlock) -> None:
        _write(self._file("unfitted", number), block.mixer.state_dict())

    def keep(self, number: int, block: Any, report: dict[str, Any] | None, streams: Streams) -> None:
        tensors = {}
        for name, parts in ((name, parts) for name, parts in streams.items() if parts):
            tensors[name] = torch.cat([stream.hidden for stream in parts])
            if parts[0].carried is not None:
                tensors[f"{name}.carried"] = torch.cat([stream.carried for stream in parts])
        _write(self._file("streams", number + 1), tensors)
        _write(self.student.mixer_file(number), block.mixer.state_dict(), report)
        self._file("streams", number).unlink(missing_ok=True)

    def reports(self) -> list[dict[str, Any]]:
        found = []
        for number in range(self.count):
            with safe_open(self.student.mixer_file(number), framework="pt") as file:
                found += [json.loads(text)] if (text := (file.metadata() or {}).get("report")) else []
        return found

    def take_back(self) -> None:
        for number in range(self.count):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._file("unfitted", number), self.student.mixer_file(number))

    @contextlib.contextmanager
    def head(self) -> Iterator[RecurrentForCausalLM]:
        with self._filled(self.student_model, torch.float32):
            self.student_model.lm_head.weight = nn.Parameter(
                self.student_model.lm_head.weight.to(self.dtype), requires_grad=False
            )
            yield self.student_model

    def groups(self, rows: PackedTokens) -> Iterator[Group]:
        """The layers by themselves, each on the hidden states that the teacher's layers before it have made."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # as a Trainer chooses
        shape = len(rows), rows.seq_len, self.student_model.config.hidden_size
        if self.first == 0:
            with self._filled(self.teacher_model, self.dtype):
                self._make_hidden(0, shape, lambda row: Stream.of(self.teacher_model, rows[row], self.dtype).hidden)
        for number in range(self.first, self.count):
            teacher_block, student_block = self.before.pair(number)
            before = self._map(self._file("hidden", number), shape)
            behind = functools.partial(_behind, teacher_block.to(device), self.teacher_model, rows, before, self.dtype)
            self._make_hidden(number + 1, shape, behind)
            folder, report = self.folder / f"layer-{number}", None
            if self.converted(number):
                learner = OneLayer(self.student_model, number, mixer=student_block.mixer)
                teacher = OneLayer(
                    self.teacher_model, number, mixer=teacher_block.mixer, input_layernorm=teacher_block.input_layernorm
                )
                group = Group(learner, teacher, HiddenRows(rows, before, self.dtype), folder, number, self.count)
                yield group
                report = group.report
            _write(self.student.mixer_file(number), student_block.mixer.state_dict(), report)
            self._file("hidden", number).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            del teacher_block, student_block, before, behind
            return_freed_memory()
        self._file("hidden", self.count).unlink(missing_ok=True)

    @torch.no_grad()
    def _make_hidden(self, number: int, shape: tuple[int, int, int], of_row: Callable[[int], Tensor]) -> None:
        """Writes hidden states (N, T, D) before a layer, unless they are there."""
        path = self._file("hidden", number)
        if path.exists():
            return
        partial = path.with_suffix(".part")
        partial.unlink(missing_ok=True)
        hidden = self._map(partial, shape)
        for row in range(len(hidden)):
            hidden[row] = of_row(row)[0]
        os.replace(partial, path)

    def _map(self, path: Path, shape: tuple[int, int, int]) -> Tensor:
        """Hidden states in a file; one that is there may be of a machine that computes in another dtype."""
        size, dtype = math.prod(shape), self.dtype
        if path.exists():
            dtype = torch.float32 if path.stat().st_size == size * torch.float32.itemsize else torch.bfloat16
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def _file(self, what: str, number: int) -> Path:
        return self.folder / f"{what}-{number}.{'bin' if what == 'hidden' else 'safetensors'}"

    @contextlib.contextmanager
    def _filled(self, model: RecurrentForCausalLM, norms: torch.dtype) -> Iterator[None]:
        """Within the block the model has the teacher's embeddings and head, mapped, and norms in the dtype `norms`."""
        tensors = self.before.teacher.ends()
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        tensors = {name: tensor.to(norms) if "norm" in name else tensor for name, tensor in tensors.items()}
        model.load_state_dict(tensors, strict=False, assign=True)
        try:
            yield
        finally:
            for name in tensors:
                model.get_submodule(name.rpartition(".")[0]).to_empty(device="meta")


class OneLayer(nn.Module):
    """Modules of one layer, under the names that they have in a whole model."""

    def __init__(self, whole: RecurrentForCausalLM, number: int, **modules: nn.Module):
        super().__init__()
        self.config, self.model = whole.config, nn.Module()
        self.model.layers = nn.ModuleDict({str(number): nn.ModuleDict(modules)})
        self.model.make_context = whole.model.make_context


class HiddenRows(Dataset):
    """Rows of text with their hidden states (N, T, D), given in `dtype`."""

    def __init__(self, rows: PackedTokens, hidden: Tensor, dtype: torch.dtype):
        self.rows, self.hidden, self.dtype, self.seq_len = rows, hidden, dtype, rows.seq_len

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index] | {"hidden": self.hidden[index].to(self.dtype)}


def _behind(
    block: RecurrentBlock, model: Any, rows: PackedTokens, before: Tensor, dtype: torch.dtype, row: int
) -> Tensor:
    """Hidden states (1, T, D) of a row behind a block of the teacher."""
    device = block.input_layernorm.weight.device
    with mixed_precision(device, dtype == torch.bfloat16):
        return block(before[row][None].to(device, dtype), None, context_of(model, rows[row], device))[0]


def _without_weights(config: Any, mixer: str) -> Any:
    """A model on the meta device, but for what its contexts need."""
    with torch.device("meta"):
        model = causal_lm_class(mixer)(config)
    model.model.rotary = RotaryFrequencies(config)
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _write(path: Path, tensors: dict[str, Tensor], report: dict[str, Any] | None = None) -> None:
    """A safetensors file, whole or not there at all; `report` goes into its header."""
    partial = path.with_name(path.name + ".part")
    about = {"format": "pt"} | ({"report": json.dumps(report)} if report else {})
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, metadata=about)
    os.replace(partial, path)
