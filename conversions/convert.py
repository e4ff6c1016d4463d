"""`convert`: a Transformer goes in, a folder that AutoModelForCausalLM loads comes out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from ..kernels.errors import RnnzooError
from ..zoo.core.registry import ATTENTION_TYPES
from .memory import keep_freed_memory
from .recipes import Recipe, load_recipe, parse_keep
from .run import Run, open_run, write_json
from .student import attention_twin, build_student, causal_lm_class, layer_types, state_bytes, student_config
from .teachers import TeacherRef, resolve_teacher

__all__ = ["convert", "prepare_recipe"]

log = logging.getLogger(__name__)
EVALUATION_CHARACTERS = 400_000
Progress = Callable[[str, int, int, dict[str, Any]], None]


def convert(
    teacher: str | None,
    recipe: str,
    out: str | Path,
    *,
    data: list[str] | None = None,
    text_field: str = "text",
    keep: str | None = None,
    state_budget: int | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    restart: bool = False,
    evaluate: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs all stages of a recipe; the same call goes on where a stopped one was, and ends at the same weights.

    Args:
        teacher: as `resolve_teacher` takes it. recipe: a name or the path of a YAML file.
        data: as `open_corpus` takes it; None: the embedded default.
        keep, state_budget, tokens, seq_len: instead of the recipe's own.
        dtype: "bfloat16" or "float32", of training and of the saved weights.
        restart: discard an earlier run in `out`.
        evaluate: measure the result on text held out from the data, beside the teacher.
        progress: called as progress(stage, done tokens, all tokens, info).
    Returns:
        The contents of results.json.
    Raises:
        RnnzooError: bad input, as one sentence.
    """
    if dtype not in ("bfloat16", "float32"):
        raise RnnzooError(f"dtype is {dtype!r}; expected bfloat16 or float32.")
    keep_freed_memory()
    found = resolve_teacher(teacher, revision=revision)
    chosen = prepare_recipe(recipe, found, keep=keep, state_budget=state_budget, tokens=tokens, seq_len=seq_len)
    request = {
        "teacher": found.sha,
        "recipe": chosen.to_dict(),
        "data": data,
        "text_field": text_field,
        "seed": seed,
        "dtype": dtype,
    }
    run = open_run(out, request, restart)
    job = _Job(run, found, chosen, data, text_field, seed, getattr(torch, dtype), progress or (lambda *_: None))
    try:
        if run.record("finished") is None:
            job.stages()
        results = job.results()
        if evaluate:
            results = job.evaluate()
        from ..cards import render_card

        render_card(run.out)
    except OSError as error:
        raise RnnzooError(
            f"Writing to {out} failed: {error.strerror or error}; make room or choose another folder, then run the same "
            "command again to go on."
        ) from error
    return results


def prepare_recipe(
    name: str,
    teacher: TeacherRef,
    *,
    keep: str | None = None,
    state_budget: int | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
) -> Recipe:
    """A recipe with the user's own values, checked against the teacher."""
    from .data import check_sequence_length

    recipe = load_recipe(name)
    given = {"keep": keep, "state_budget": state_budget, "tokens": tokens, "seq_len": seq_len}
    recipe = dataclasses.replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if seq_len is None:
        recipe.seq_len = min(recipe.seq_len, teacher.config.max_position_embeddings)
    check_sequence_length(recipe.seq_len, teacher.config, f"The teacher {teacher.name}")
    if state_budget is not None and recipe.student != "hedgehog":
        raise RnnzooError(
            f"--state-budget divides windows, but the recipe {recipe.name} has none: its state has a fixed size."
        )
    parse_keep(recipe.keep, teacher.config.num_hidden_layers)
    return recipe


def keep_steps(recipe: Recipe, layers: int) -> list[str]:
    """What stays attention at each step: progressively less, or the end at once."""
    target = set(parse_keep(recipe.keep, layers))
    if not recipe.progressive:
        return [recipe.keep]
    shares = [f"1/{n}" for n in (2, 4, 8) if n <= layers]
    return [share for share in shares if set(parse_keep(share, layers)) > target] + [recipe.keep]


class _Job:
    """One conversion under way. Heavy things (teacher, data) are made when a stage first needs them."""

    def __init__(
        self,
        run: Run,
        teacher: TeacherRef,
        recipe: Recipe,
        data: list[str] | None,
        text_field: str,
        seed: int,
        dtype: torch.dtype,
        progress: Progress,
    ):
        self.run, self.teacher, self.recipe, self.seed, self.dtype = run, teacher, recipe, seed, dtype
        self.data, self.text_field, self.progress = data, text_field, progress

    # What stages need ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def model(self) -> Any:
        return self.teacher.load(torch.float32)

    @functools.cached_property
    def twin(self) -> Any:
        return attention_twin(self.teacher, self.model, self.dtype)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return self.teacher.tokenizer()

    @functools.cached_property
    def corpus(self) -> Any:
        from .data import open_corpus

        if self.data:
            return open_corpus(self.data, self.text_field, tokenizer=self.tokenizer)
        from .data import default_corpus

        return default_corpus(
            self.tokenizer,
            model=self.teacher.load(self.dtype),
            sampled_tokens=self.recipe.tokens // 2,
            sampled_length=min(self.recipe.seq_len, 1024),
            seed=self.seed,
            progress=lambda done, total: self.progress("sampled text", done, total, {}),
        )

    @functools.cached_property
    def evaluation_texts(self) -> list[str]:
        path = self.run.folder / "evaluation_texts.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        texts, size = [], 0
        for text in self.corpus.documents("evaluation", seed=0):
            texts.append(text[:EVALUATION_CHARACTERS])
            size += len(text)
            if size >= EVALUATION_CHARACTERS:
                break
        write_json(path, texts)
        return texts

    def packed(self, name: str, tokens: int) -> Any:
        """Calibration or training rows, made once and kept for a restart."""
        from .data import PackedTokens, TextHashes, pack

        folder = self.run.folder / "data"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.safetensors"
        if path.exists():
            return PackedTokens.load(path)
        exclude = [TextHashes.of(self.evaluation_texts, "evaluation")]
        if name == "training":
            exclude.append(self.packed("calibration", self.recipe.calibration_tokens).hashes)
        rows = pack(
            self.corpus.documents(name, seed=self.seed),
            self.tokenizer,
            self.recipe.seq_len,
            tokens,
            name=name,
            source=self.corpus.source,
            exclude=exclude,
            long_documents=True,
            progress=lambda done, total: self.progress(f"{name} text", done, total, {}),
        )
        rows.save(path)
        return rows

    # Stages --------------------------------------------------------------------------------------------------------

    def stages(self) -> None:
        layers = self.teacher.config.num_hidden_layers
        steps = keep_steps(self.recipe, layers)
        folder = self.run.student_folder()
        student = None if folder is None else causal_lm_class(self.recipe.student).from_pretrained(folder).float()
        used = 0
        for number, keep in enumerate(steps):
            prefix = f"{number + 1}-" if len(steps) > 1 else ""
            name = f"{prefix}initialise"
            if self.run.record(name) is None:
                self.progress(name, 0, 1, {})
                student = self._initialise(student, parse_keep(keep, layers))
                self.run.finish(name, student, {"tokens": 0, "kept": parse_keep(keep, layers)})
                self.progress(name, 1, 1, {})
            for stage in self.recipe.stages:
                name = f"{prefix}{stage.name}"
                tokens = int(self.recipe.tokens * stage.share / len(steps))
                rows = max(1, tokens // self.recipe.seq_len) if tokens else 0
                if self.run.record(name) is None:
                    if stage.kind == "calibrate":
                        student, report = self._calibrate(student, name)
                    elif rows == 0:
                        continue
                    else:
                        report = self._train(student, stage, name, used, rows)
                    self.run.finish(name, student, report)
                used += rows if stage.kind != "calibrate" else 0
        assert student is not None
        self.run.publish(student.to(self.dtype), self.tokenizer)
        self.run.finish("finished", None, {})

    def _initialise(self, previous: Any, keep: list[int]) -> Any:
        types = layer_types(self.teacher, self.recipe, keep)
        config = student_config(self.teacher, self.recipe, types)
        student = build_student(self.teacher, self.model, config, self.recipe.student, torch.float32, self.seed)
        if previous is not None:
            _continue_from(student, previous)
        return student

    def _calibrate(self, student: Any, name: str) -> tuple[Any, dict[str, Any]]:
        from .stages.calibrate import allocate, fit_features, measure_windows

        if self.recipe.student != "hedgehog":
            raise RnnzooError(
                f"The stage {name} calibrates hedgehog layers; the recipe's student is {self.recipe.student}."
            )
        started = time.monotonic()
        data = self.packed("calibration", self.recipe.calibration_tokens)
        config = student.config
        sinks = config.num_sinks
        converted = [i for i, kind in enumerate(config.layer_types) if kind not in ATTENTION_TYPES]
        sizes: Any = [[1] * config.num_key_value_heads] * len(config.layer_types)
        if self.recipe.state_budget is not None:
            least = student_config(self.teacher, self.recipe, config.layer_types, window_sizes=sizes)
            fixed = state_bytes(least, self.recipe.student, self.dtype)
            heads = len(converted) * config.num_key_value_heads
            longer = student_config(
                self.teacher, self.recipe, config.layer_types, window_sizes=[[2] * len(row) for row in sizes]
            )
            token = (state_bytes(longer, self.recipe.student, self.dtype) - fixed) // heads
            slots = (self.recipe.state_budget - fixed) // token + heads
            report = lambda done, total: self.progress(name, done, total, {})  # noqa: E731
            measured = measure_windows(self.twin, data, sinks, self.seed, report)
            sizes = allocate(measured, converted, slots)
            config = student_config(self.teacher, self.recipe, config.layer_types, window_sizes=sizes)
            student = build_student(self.teacher, self.model, config, self.recipe.student, torch.float32, self.seed)
        fit_features(student, self.twin, data, self.seed)
        return student, {"tokens": data.num_tokens, "seconds": round(time.monotonic() - started, 1)}

    def _train(self, student: Any, stage: Any, name: str, first_row: int, rows: int) -> dict[str, Any]:
        from .stages.training import train_stage

        data = self.packed("training", self.recipe.tokens)
        part = data.rows(first_row, rows)
        return train_stage(
            student,
            self.twin,
            stage,
            part,
            self.run.folder / name,
            batch_tokens=self.recipe.batch_tokens,
            bf16=self.dtype == torch.bfloat16,
            seed=self.seed,
            progress=lambda done, total, info: self.progress(name, done, total, info),
        )

    # Results -------------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """results.json with everything but the evaluation."""
        path = self.run.out / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"schema": 1}
        model = causal_lm_class(self.recipe.student).from_pretrained(self.run.out)
        config = model.config
        done = [stage for stage in self.run.stages if stage["name"] != "finished"]
        shown = [{k: v for k, v in stage.items() if k not in ("student", "kept")} for stage in done]
        text = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False)
        records = {}
        for name in ("calibration", "training"):
            file = self.run.folder / "data" / f"{name}.safetensors"
            if file.exists():
                from .data import PackedTokens

                records[name] = PackedTokens.load(file).record()
        results["model"] = (results.get("model") or {}) | {
            "name": self.run.out.resolve().name,
            "architecture": self.recipe.student,
            "model_type": config.model_type,
            "parameters": model.num_parameters(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layer_types": config.layer_types,
            "state_bytes": state_bytes(config, self.recipe.student, self.dtype),
            "windows": getattr(config, "window_sizes", None),
        }
        results["teacher"] = (results.get("teacher") or {}) | {
            "name": self.teacher.name,
            "kind": self.teacher.kind,
            "sha": self.teacher.sha,
            "licence": self.teacher.licence,
            "base_model": self.teacher.base_model,
            "parameters": self.teacher.parameters,
            "revision": self.teacher.revision,
        }
        digest = hashlib.sha256(text.encode()).hexdigest()
        results["recipe"] = {"name": self.recipe.name, "sha256": digest, "yaml": text}
        training = [stage for stage in done if "loss_first" in stage]
        results["conversion"] = (results.get("conversion") or {}) | {
            "tokens": sum(stage["tokens"] for stage in training),
            "seconds": sum(stage.get("seconds", 0) for stage in done),
            "hardware": f"{torch.get_num_threads()} threads, {platform.machine()}",
            "stages": shown,
            "data": ((results.get("conversion") or {}).get("data") or {}) | records,
        }
        write_json(path, results)
        return results

    def evaluate(self) -> dict[str, Any]:
        from .data import TextHashes, refuse_overlap
        from .evaluation import Dataset, evaluate

        texts = self.evaluation_texts
        hashes = TextHashes.of(texts, "evaluation")
        for name in ("calibration", "training"):
            if (self.run.folder / "data" / f"{name}.safetensors").exists():
                refuse_overlap(hashes, self.packed(name, 0).hashes)
        results = self.results()
        record = {
            "sha256": hashes.sha256,
            "source": results["conversion"]["data"]["training"]["source"],
            "characters": sum(map(len, texts)),
        }
        results["conversion"]["data"]["evaluation"] = record
        write_json(self.run.out / "results.json", results)
        return evaluate(
            self.run.out,
            teacher=self.teacher,
            datasets=[Dataset.of_texts("held-out text", texts)],
            limits="quick",
            dtype=self.dtype,
            progress=self.progress,
        )


@torch.no_grad()
def _continue_from(student: Any, previous: Any) -> None:
    """Takes over what an earlier step trained; layers converted only now start from its attention."""
    from ..zoo.core.mixer import AttentionWeights

    before = previous.state_dict()
    state = student.state_dict()
    for i, (new, old) in enumerate(zip(student.model.layers, previous.model.layers, strict=True)):
        if type(new.mixer) is type(old.mixer):
            continue
        before = {name: tensor for name, tensor in before.items() if not name.startswith(f"model.layers.{i}.mixer.")}
        proj = old.mixer.proj
        weights = {name: getattr(proj, f"{name}_proj").weight for name in "qkvo"}
        weights |= {f"{name}_bias": getattr(proj, f"{name}_proj").bias for name in "qkvo"}
        norms = {
            name: None if getattr(proj, name) is None else getattr(proj, name).weight for name in ("q_norm", "k_norm")
        }
        sizes = dict(num_heads=proj.num_heads, num_kv_heads=proj.num_kv_heads, head_dim=proj.head_dim)
        new.mixer.init_from_attention(AttentionWeights(**weights, **norms, **sizes))
        fresh = new.mixer.state_dict()
        state |= {f"model.layers.{i}.mixer.{name}": tensor for name, tensor in fresh.items()}
    student.load_state_dict(state | dict(itertools.chain(before.items())), strict=False)
    student.tie_weights()
