"""Teacher and student of a conversion with one layer in memory at a time; `offload.py` says how its files lie.

N rows of T tokens, D hidden_size.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.errors import RnnzooError
from ..kernels.losses import linear_cross_entropy
from ..zoo.core.layers import make_norm
from ..zoo.core.registry import ATTENTION_TYPES, mixer_class
from ..zoo.core.rotary import RotaryFrequencies
from ..zoo.core.sizes import causal_lm_class
from .context import StageContext
from .layer_files import HiddenFiles, SmallStreams, read_tensors, write_tensors
from .mapped import MappedTeacher, block_of, new_mixer
from .memory import return_freed_memory
from .precision import mixed_precision
from .processes import rows_per_step
from .recipes import Recipe
from .run_folder import Run, write_json
from .stages.align import Align
from .stages.calibrate import Calibrate
from .stages.training import next_tokens
from .student import layer_types, student_config

if TYPE_CHECKING:
    from ..zoo.core.model import RecurrentBlock
    from .data import PackedTokens
    from .fit.closed_form import Stream

__all__ = ["Layers"]


class Layers:
    """Teacher and student of a conversion, layer by layer."""

    def __init__(self, run: Run, context: StageContext, kept: list[int]):
        self.run, self.context, self.kept = run, context, kept
        self.teacher = MappedTeacher(context.teacher)
        self.folder = run.folder / "layers"
        own = context.teacher.family.attention_types(context.teacher.config)
        self.twin_config = student_config(context.teacher, Recipe("twin", "full_attention", []), own)
        self.config = student_config(
            context.teacher, context.recipe, layer_types(context.teacher, context.recipe, kept)
        )
        self.count, self.bf16 = len(own), context.dtype == torch.bfloat16
        with torch.device("meta"):
            self.skeleton: Any = causal_lm_class(context.recipe.student)(self.config)
            self.twin_skeleton: Any = causal_lm_class("full_attention")(self.twin_config)
        for skeleton, config in ((self.skeleton, self.config), (self.twin_skeleton, self.twin_config)):
            skeleton.model.rotary = RotaryFrequencies(config)

    def pair(self, number: int, previous: str) -> tuple[RecurrentBlock, RecurrentBlock]:
        """The teacher's block, and ours after the stage `previous`."""
        weights, shared = self.teacher.layer(number)
        attention = mixer_class(self.twin_config.layer_types[number])(self.twin_config, number)
        attention.init_from_attention(weights)
        theirs = block_of(self.twin_config, number, attention.to(self.context.dtype), shared, self.context.dtype)
        mixer = mixer_class(self.config.layer_types[number])(self.config, number)
        mixer.load_state_dict(read_tensors(self.mixer_file(previous, number)))
        ours = block_of(self.config, number, mixer, shared, self.context.dtype)
        for norm in (ours.input_layernorm, ours.post_attention_layernorm):
            if norm is not None:
                norm.float()  # as in a student that is whole in memory
        return theirs, ours

    def mixer_file(self, stage: str, number: int) -> Path:
        return self.folder / stage / f"mixer-{number}.safetensors"

    def unfitted_file(self, stage: str, number: int) -> Path:
        """The mixer as it was before its fit in closed form, which may be taken back."""
        return self.folder / stage / f"unfitted-{number}.safetensors"

    def converted(self, number: int) -> bool:
        return self.config.layer_types[number] not in ATTENTION_TYPES

    def done(self, stage: str) -> int:
        """Layers of a stage that are finished."""
        (self.folder / stage).mkdir(parents=True, exist_ok=True)
        return next((i for i in range(self.count) if not self.mixer_file(stage, i).exists()), self.count)

    def embedded(self) -> Any:
        """The embeddings, mapped."""
        return self.teacher.ends()["model.embed_tokens.weight"]

    # Stages --------------------------------------------------------------------------------------------------------

    def initialise(self) -> dict[str, Any]:
        started = time.monotonic()
        for number in range(self.done("initialise"), self.count):
            weights, _ = self.teacher.layer(number)
            mixer = new_mixer(self.config, number, weights, self.context.seed + number, self.skeleton)
            write_tensors(self.mixer_file("initialise", number), mixer.state_dict())
            self.context.progress("initialise", number + 1, self.count, {})
        return {"tokens": 0, "kept": self.kept, "seconds": round(time.monotonic() - started, 1)}

    @torch.no_grad()
    def calibrate(self, stage: Calibrate, previous: str) -> dict[str, Any]:
        from .fit.closed_form import ClosedForm

        started = time.monotonic()
        data = self.context.calibration()
        alone = len(data) >= 3  # as `calibrate.fit_if_better` has it
        fitted, judged = (data.rows(0, len(data) - 1), data.rows(len(data) - 1, 1)) if alone else (data, data)
        parts = stage.chosen(self.context.recipe)
        how = ClosedForm([part for part in parts if part != "features"], stage.ridge, stage.correct, stage.weighting)
        first = self.done(stage.name)
        streams = SmallStreams(self, self.folder / stage.name, fitted, judged, first)
        for number in range(first, self.count):
            theirs, ours = self.pair(number, previous)
            with mixed_precision("cpu", self.bf16):
                report = self._fit(number, theirs, ours, streams, how, "features" in parts, stage.name)
                for stream in streams.ours + streams.judged:
                    stream.advance(ours)
            streams.save(number + 1)
            write_tensors(self.mixer_file(stage.name, number), ours.mixer.state_dict(), report)
            streams.forget(number)
            del theirs, ours
            return_freed_memory()
            self.context.progress(stage.name, number + 1, self.count, {})
        reports = self.reports(stage.name)
        found = {f"error_{name}": sum(r[name] for r in reports) / max(1, len(reports)) for name in ("before", "after")}
        if how.parts:
            found |= self._judge(stage.name, streams, judged)
        return {"tokens": data.num_tokens, "seconds": round(time.monotonic() - started, 1), "parts": parts} | found

    def _judge(self, stage: str, streams: SmallStreams, data: PackedTokens) -> dict[str, Any]:
        """Takes the fits back where the loss on the rows that judge is larger with them."""
        losses = {name: self._loss(getattr(streams, name), data) for name in ("unfitted", "judged")}
        kept = losses["judged"] <= losses["unfitted"]
        for number in range(self.count if not kept else 0):
            if self.unfitted_file(stage, number).exists():
                os.replace(self.unfitted_file(stage, number), self.mixer_file(stage, number))
        shown = [value if math.isfinite(value) else None for value in losses.values()]
        return {"loss_before": shown[0], "loss_after": shown[1], "fits_kept": kept}

    def _loss(self, streams: list[Stream], data: PackedTokens) -> float:
        """Mean cross-entropy per token behind the last layer, in nats; infinite where it is not a number."""
        ends = self.teacher.ends()
        norm = make_norm(self.config)
        norm.load_state_dict({name: ends[f"model.norm.{name}"].float() for name in norm.state_dict()})
        head = ends.get("lm_head.weight", ends["model.embed_tokens.weight"])
        total, count = 0.0, 0
        for i, stream in enumerate(streams):
            labels = next_tokens(data[i]["input_ids"][None], data[i]["seq_ids"][None]).flatten()
            hidden = norm(stream.hidden).flatten(0, 1).to(head.dtype)
            total += float(linear_cross_entropy(hidden, head, labels, reduction="sum"))
            count += int((labels != -100).sum())
        loss = total / max(1, count)
        return loss if math.isfinite(loss) else math.inf

    def _fit(
        self, number: int, theirs: Any, ours: Any, streams: SmallStreams, how: Any, features: bool, stage: str
    ) -> dict | None:
        """Refits a converted layer, and moves on the streams of the teacher and of what is not fitted."""
        from .fit.closed_form import Layer, output_projection

        output = output_projection(ours.mixer)
        if features and self.converted(number):
            self._fit_features(theirs, ours, streams.theirs[0])
        write_tensors(self.unfitted_file(stage, number), ours.mixer.state_dict())
        for stream in streams.unfitted:
            stream.advance(ours)
        if not self.converted(number) or output is None or not how.parts:
            for stream in streams.theirs:
                stream.advance(theirs)
            return None
        layer = Layer(theirs, ours, output, how, None)
        layer.teach(streams.theirs)
        before, after = layer.fit(streams.ours)
        if not math.isfinite(after):
            raise RnnzooError(f"The outputs of the student's layer {number} are not finite on the calibration text.")
        return {"before": before, "after": after}

    def _fit_features(self, theirs: Any, ours: Any, stream: Stream) -> None:
        from .fit.observe import sample_rows

        q, k, _ = (x[0].float() for x in theirs.mixer.proj.split(theirs.input_layernorm(stream.hidden)))
        with mixed_precision("cpu", False):
            ours.mixer.fit_features(q, k, stream.ctx, sample_rows(len(q), self.context.seed), self.context.seed)

    def align(self, stage: Align, previous: str, data: PackedTokens) -> dict[str, Any]:
        started = time.monotonic()
        per_step = rows_per_step(self.context.recipe.batch_tokens, data.seq_len, len(data), 1)
        steps = max(1, len(data) // per_step)
        first = self.done(stage.name)
        folder = self.folder / stage.name
        hidden = HiddenFiles(folder, (steps * per_step, data.seq_len, self.config.hidden_size), self.context.dtype)
        if first == 0:
            table = self.embedded()
            with hidden.new(0) as whole:
                for row in range(len(whole)):
                    ids = data[row]["input_ids"]
                    whole[row] = self.twin_skeleton.model.enter(nn.functional.embedding(ids, table)).to(
                        self.context.dtype
                    )
            del table
        for number in range(first, self.count):
            theirs, ours = self.pair(number, previous)
            with hidden.new(number + 1) as behind:
                report = self._learn(number, stage, theirs, ours, data, hidden.of(number), behind, (steps, per_step))
            write_tensors(self.mixer_file(stage.name, number), ours.mixer.state_dict(), report)
            hidden.forget(number)
            del theirs, ours
            return_freed_memory()
        hidden.forget(self.count)
        reports = self.reports(stage.name)
        tokens = steps * per_step * data.seq_len
        mean = {name: sum(r[name] for r in reports) / len(reports) for name in ("loss_first", "loss_last")}
        return {"tokens": tokens, "seconds": round(time.monotonic() - started, 1)} | mean

    def _learn(
        self, number: int, stage: Align, theirs: Any, ours: Any, data: PackedTokens, before: Tensor, behind: Tensor,
        sizes: tuple[int, int],
    ) -> dict | None:  # fmt: skip
        """Trains our mixer on what the teacher's is given and makes, row by row, and moves these rows on."""
        from .fit.closed_form import caught
        from .stages.align import aligned_parameters
        from .stages.layer_targets import LOSSES, what_it_does
        from .stages.parameters import parts_of

        steps, per_step = sizes
        chosen = aligned_parameters(stage, self.skeleton)
        prefix = f"model.layers.{number}.mixer."
        trained = {prefix + name: p for name, p in ours.mixer.named_parameters() if chosen(prefix + name)}
        learner = Learner(stage, trained, parts_of(self.skeleton), steps) if trained else None
        mixer = ours.mixer.train().requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        losses = []
        for step in range(steps):
            total = 0.0
            for row in range(step * per_step, (step + 1) * per_step):
                seq_ids = data[row]["seq_ids"][None]
                seq_ids = None if bool((seq_ids == seq_ids[:, :1]).all()) else seq_ids
                ctx = self.twin_skeleton.model.make_context(1, data.seq_len, torch.device("cpu"), seq_ids=seq_ids)
                with mixed_precision("cpu", self.bf16):
                    with torch.no_grad(), caught(theirs.mixer) as seen:
                        behind[row] = theirs(before[row][None], None, ctx)[0][0]
                    if learner is None:
                        continue
                    wanted = seen.output
                    if stage.target != "outputs":
                        with torch.no_grad():
                            wanted = what_it_does(theirs.mixer, seen.given, ctx, stage.target)
                    said = what_it_does(mixer, seen.given, ctx, stage.target)
                    loss = stage.weight * LOSSES[stage.loss](said, wanted.float()) / per_step
                loss.backward()
                total += float(loss.detach())
            if learner is not None:
                learner.step()
                losses.append(total)
            done = number * steps + step + 1
            tokens = per_step * data.seq_len
            told = {"layer": number} | ({"loss": total} if losses else {})
            self.context.progress(stage.name, done * tokens, self.count * steps * tokens, told)
        if not losses:
            return None
        if not math.isfinite(losses[-1]):
            raise RnnzooError(
                f"The loss of layer {number} is no longer a number; give the stage a lower learning rate."
            )
        return {"loss_first": losses[0], "loss_last": sum(losses[-4:]) / len(losses[-4:])}

    def reports(self, stage: str) -> list[dict[str, float]]:
        """What the layers of a stage have reported."""
        from safetensors import safe_open

        found = []
        for number in range(self.count):
            with safe_open(self.mixer_file(stage, number), framework="pt") as file:
                about = file.metadata() or {}
            if "report" in about:
                found.append(json.loads(about["report"]))
        return found

    def publish(self, stage: str) -> None:
        """The finished model, a file a layer, into OUT."""
        whole = self.run.folder / "model"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        parts = self.count + 1
        names = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
        where: dict[str, str] = {}
        size = 0
        for number, file in enumerate(names):
            if number == self.count:
                tensors = self.teacher.ends()
            else:
                prefix = f"model.layers.{number}."
                tensors = {prefix + name: tensor for name, tensor in self.teacher.layer(number)[1].items()}
                mixer = read_tensors(self.mixer_file(stage, number))
                tensors |= {f"{prefix}mixer.{name}": tensor for name, tensor in mixer.items()}
            tensors = {name: tensor.to(self.context.dtype).contiguous() for name, tensor in tensors.items()}
            write_tensors(whole / file, tensors)
            where |= dict.fromkeys(tensors, file)
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            del tensors
            return_freed_memory()
        write_json(whole / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
        self.config.dtype = self.context.dtype
        self.config.save_pretrained(whole)
        self.skeleton.generation_config.save_pretrained(whole)
        self.context.tokenizer.save_pretrained(whole)
        self.run.publish_folder(whole)


class Learner:
    """The optimiser of one layer, as a stage's trainer makes it."""

    def __init__(self, stage: Align, trained: dict[str, nn.Parameter], parts: dict[str, str], steps: int):
        self.stage, self.steps, self.at = stage, steps, 0
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            groups.setdefault(stage.rate(parts[name]), []).append(parameter)
        self.parameters = list(trained.values())
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate, "peak": rate} for rate, parameters in groups.items()],
            betas=(stage.beta1, stage.beta2),
            weight_decay=stage.weight_decay,
        )

    def step(self) -> None:
        from .stages.schedules import rate_factor

        torch.nn.utils.clip_grad_norm_(self.parameters, self.stage.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(self.stage, group["peak"], self.at, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.at += 1
