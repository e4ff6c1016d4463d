"""`convert`: a Transformer goes in, a folder that AutoModelForCausalLM loads comes out."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..kernels.errors import RnnzooError
from ..zoo.core.registry import ATTENTION_TYPES
from ..zoo.core.sizes import causal_lm_class
from .energy import check_energy, measured_energy
from .memory import keep_freed_memory, return_freed_memory
from .prepare import keep_steps, prepare_recipe
from .recipes import Recipe, parse_keep
from .results import write_results
from .run import FINISHED, Run, alone_in, holds_run, open_run, write_json
from .student import (
    attention_twin,
    build_student,
    continue_from,
    layer_types,
    student_config,
    window_slots,
)
from .teachers import TeacherRef, resolve_teacher
from .teachers.files import user_errors

__all__ = ["convert"]

EVALUATION_CHARACTERS = 400_000
Progress = Callable[[str, int, int, dict[str, Any]], None]


def convert(
    teacher: str | None,
    recipe: str,
    out: str | Path,
    *,
    data: list[str] | None = None,
    text_field: str = "text",
    student: str | None = None,
    keep: str | None = None,
    state_budget: int | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    restart: bool = False,
    evaluate: bool = True,
    revision: str | None = None,
    energy: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs all stages of a recipe; the same call goes on where a stopped one was, and ends at the same weights.

    Args:
        teacher: as `resolve_teacher` takes it. recipe: a name or the path of a YAML file.
        data: as `open_corpus` takes it; None: the embedded default.
        student, keep, state_budget, tokens, seq_len: instead of the recipe's own.
        dtype: "bfloat16" or "float32", of training and of the saved weights.
        restart: discard an earlier run in `out`.
        evaluate: measure the result on text held out from the data, beside the teacher, and the way there.
        energy: ISO code of the country, such as "DEU": measure energy and CO2 of the stages with CodeCarbon.
        progress: called as progress(stage, done tokens, all tokens, info).
    Returns:
        The contents of results.json.
    Raises:
        RnnzooError: bad input, as one sentence.
    """
    if dtype not in ("bfloat16", "float32"):
        raise RnnzooError(f"dtype is {dtype!r}; expected bfloat16 or float32.")
    check_energy(energy)
    keep_freed_memory()
    found = resolve_teacher(teacher, revision=revision)
    own = {"student": student, "keep": keep, "state_budget": state_budget, "tokens": tokens, "seq_len": seq_len}
    chosen = prepare_recipe(recipe, found, **own, dtype=getattr(torch, dtype))
    if data and (restart or not holds_run(out)):
        from .data import open_corpus

        # Unusable data must be told before an earlier run is discarded.
        next(open_corpus(data, text_field).documents("training"), None)
    request = {
        "teacher": found.sha,
        "recipe": chosen.to_dict(),
        "data": data,
        "text_field": text_field,
        "seed": seed,
        "dtype": dtype,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone_in(out))
        run = open_run(out, request, restart)
        if run.created:
            stack.enter_context(alone_in(out))
        job = _Job(run, found, chosen, data, text_field, seed, getattr(torch, dtype), progress or (lambda *_: None))
        job.ladder = evaluate
        try:
            with user_errors(f"The conversion into {out} stopped, and the same command will go on with it"):
                if run.record(FINISHED) is None:
                    with measured_energy(energy, run.folder):
                        job.stages()
                results = job.results()
                if evaluate:
                    results = job.evaluate()
                from ..cards import render_card

                render_card(run.out)
        except RnnzooError:
            if not run.stages:
                run.discard()
            raise
    return results


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
        self.ladder = False  # measure the student after each stage

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
        self._prepare_data()
        used = 0
        for number, keep in enumerate(steps):
            prefix = f"{number + 1}-" if len(steps) > 1 else ""
            name = f"{prefix}initialise"
            if self.run.record(name) is None:
                self.progress(name, 0, 1, {})
                student = self._initialise(student, parse_keep(keep, layers))
                report = {"tokens": 0, "kept": parse_keep(keep, layers)} | self._rung(student, name)
                if number == 0 and (found := self._held_out(self.twin, "teacher")):
                    report["teacher_perplexity"] = found
                self.run.finish(name, student, report)
                self.progress(name, 1, 1, {})
            for stage in self.recipe.stages:
                name = f"{prefix}{stage.name}"
                tokens = int(self.recipe.tokens * stage.share / len(steps))
                rows = max(1, tokens // self.recipe.seq_len) if tokens else 0
                if self.run.record(name) is None:
                    if stage.kind == "calibrate":
                        earlier = parse_keep(steps[number - 1], layers) if number else range(layers)
                        fresh = sorted(set(earlier) - set(parse_keep(keep, layers)))
                        student, report = self._calibrate(student, name, fresh)
                    elif rows == 0:
                        continue
                    else:
                        report = self._train(student, stage, name, used, rows)
                    self.run.finish(name, student, report | self._rung(student, name))
                used += rows if stage.kind != "calibrate" else 0
        assert student is not None
        self.run.publish(student.to(self.dtype), self.tokenizer)
        self.run.finish(FINISHED, None, {})

    def _rung(self, student: Any, name: str) -> dict[str, Any]:
        """What a stage records of the student after it."""
        found = self._held_out(student, name)
        names = {"value": "perplexity", "stderr": "perplexity_stderr", "tokens": "perplexity_tokens"}
        return {names[key]: value for key, value in found.items()}

    def _held_out(self, model: Any, name: str) -> dict[str, Any]:
        if not self.ladder:
            return {}
        from .stages.ladder import held_out_perplexity

        return held_out_perplexity(
            model,
            self.tokenizer,
            self.evaluation_texts,
            window=self.recipe.seq_len,
            bf16=self.dtype == torch.bfloat16,
            progress=lambda done, total: self.progress(f"{name}, held-out text", done, total, {}),
        )

    def _initialise(self, previous: Any, keep: list[int]) -> Any:
        types = layer_types(self.teacher, self.recipe, keep)
        config = student_config(self.teacher, self.recipe, types)
        student = build_student(self.teacher, self.model, config, self.recipe.student, torch.float32, self.seed)
        if previous is not None:
            continue_from(student, previous)
        return student

    def _prepare_data(self) -> None:
        """Makes all rows before the first stage, so that unusable text stops a run before it began."""
        kinds = {stage.kind for stage in self.recipe.stages}
        if self.recipe.tokens and kinds & {"align", "train"}:
            self.packed("training", self.recipe.tokens)
        elif "calibrate" in kinds:
            self.packed("calibration", self.recipe.calibration_tokens)

    def _calibrate(self, student: Any, name: str, fresh: list[int]) -> tuple[Any, dict[str, Any]]:
        """Windows for all converted layers; features for the layers `fresh`, converted since the last calibration."""
        from .stages.calibrate import allocate, fit_features, measure_windows

        started = time.monotonic()
        data = self.packed("calibration", self.recipe.calibration_tokens)
        config = student.config
        converted = [i for i, kind in enumerate(config.layer_types) if kind not in ATTENTION_TYPES]
        if self.recipe.state_budget is not None:
            slots = window_slots(self.teacher, self.recipe, config.layer_types, self.dtype)
            report = lambda done, total: self.progress(name, done, total, {})  # noqa: E731
            measured = measure_windows(self.twin, data, config.num_sinks, self.seed, report)
            sizes = allocate(measured, converted, slots)
            config = student_config(self.teacher, self.recipe, config.layer_types, window_sizes=sizes)
            sized = build_student(self.teacher, self.model, config, self.recipe.student, torch.float32, self.seed)
            continue_from(sized, student)
            student = sized
        fit_features(student, self.twin, data, self.seed, fresh)
        return student, {"tokens": data.num_tokens, "seconds": round(time.monotonic() - started, 1)}

    def _train(self, student: Any, stage: Any, name: str, first_row: int, rows: int) -> dict[str, Any]:
        from .stages.training import train_stage

        data = self.packed("training", self.recipe.tokens)
        part = data.rows(first_row, rows)
        twin = self.twin
        self.__dict__.pop("model", None)  # in float32 and no longer needed; a later step loads it again
        return_freed_memory()
        return train_stage(
            student,
            twin,
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
        return write_results(self.run, self.recipe, self.teacher, self.dtype, self.seed)

    def _source(self, records: dict[str, Any]) -> str:
        """What the text is; a run that neither calibrates nor trains has packed none."""
        found = [records[name]["source"] for name in ("training", "calibration") if name in records]
        return found[0] if found else self.corpus.source

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
            "source": self._source(results["conversion"]["data"]),
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
