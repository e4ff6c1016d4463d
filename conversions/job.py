"""One conversion under way: what its stages need, and their order."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..zoo.core.sizes import causal_lm_class
from .memory import return_freed_memory
from .prepare import stage_steps, stage_tokens
from .processes import Processes
from .recipes import Recipe, keep_steps, parse_keep
from .recipes.keep import needs_ranking
from .recipes.stages import Calibrate, Extend, OwnData, TrainedStage
from .results import write_results
from .run import FINISHED, RANKING, Run, write_json
from .selection import load_ranking, rank_layers, save_ranking
from .stages import run_stage
from .student import attention_twin, build_student, continue_from, layer_types, student_config
from .teachers import TeacherRef

if TYPE_CHECKING:
    from .stages.training import StageTrainer

__all__ = ["Job", "Part", "Progress"]

EVALUATION_CHARACTERS = 400_000
Progress = Callable[[str, int, int, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """What one stage of a run is given.

    Attributes:
        name: of the stage within the run, also of its folder. rows: of the training text that are its own.
        fresh: layers converted since the stage ran before, in a recipe that converts step by step.
    """

    name: str
    rows: range
    fresh: list[int]


class Job:
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
        self.checkpointing = False  # of activations, in stages that train
        self.offload = False  # one layer in memory at a time, see `offload.py`
        self.chat_data: list[str] | None = None  # for stages that have data of their own
        self.processes = Processes()
        self._take_ranking()

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
            record=self.run.folder / "default_text.json",
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

    def packed(self, name: str, tokens: int, length: int | None = None) -> Any:
        """Rows, made once and kept for a restart: "calibration", or of the training text "training" and other names.

        Args:
            length: tokens of a row, if not the recipe's.
        """
        from .data import PackedTokens, TextHashes, pack

        folder = self.run.folder / "data"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.safetensors"
        if path.exists():
            return PackedTokens.load(path)
        exclude = [TextHashes.of(self.evaluation_texts, "evaluation")]
        if name != "calibration":
            exclude.append(self.packed("calibration", self.recipe.calibration_tokens).hashes)
        rows = pack(
            self.corpus.documents("calibration" if name == "calibration" else "training", seed=self.seed),
            self.tokenizer,
            length or self.recipe.seq_len,
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
        if self.offload:
            from .offload import run_offloaded

            return run_offloaded(self)
        layers = self.teacher.config.num_hidden_layers
        self.processes.first(self.teacher.fetch)
        student = self._saved_student()
        self.processes.first(self.prepare_data)
        if needs_ranking(self.recipe.keep) and not self.recipe.ranking:
            self.processes.only(lambda: save_ranking(self.run.folder / RANKING, rank_layers(self)))
            self._take_ranking()
        steps = keep_steps(self.recipe, layers)
        used: dict[str, int] = {}
        for number, keep in enumerate(steps):
            prefix = f"{number + 1}-" if len(steps) > 1 else ""
            name = f"{prefix}initialise"
            if self.run.record(name) is None:
                begin = functools.partial(self._begin, name, student, parse_keep(keep, layers), first=number == 0)
                student = self._by_main(name, begin)
            earlier = parse_keep(steps[number - 1], layers) if number else range(layers)
            fresh = sorted(set(earlier) - set(parse_keep(keep, layers)))
            for stage in self.recipe.stages:
                if not stage_steps(self.recipe, stage, layers)[number]:
                    continue
                tokens = stage_tokens(self.recipe, stage, layers)[number]
                rows = max(1, tokens // stage.row_length(self.recipe)) if tokens else 0
                text = stage.name if stage.own_rows else "training"
                first = used.get(text, 0)
                used[text] = first + rows
                part = Part(f"{prefix}{stage.name}", range(first, first + rows), fresh)
                if self.run.record(part.name) is None:
                    if isinstance(stage, TrainedStage) and not stage.takes(self.recipe, rows):
                        continue
                    work = functools.partial(run_stage, self, stage, student, part)
                    if isinstance(stage, TrainedStage):  # by all processes together
                        trained = self._whole(work())
                        work = lambda trained=trained: trained  # noqa: E731
                    student = self._by_main(part.name, work)
        self.processes.only(lambda: self._publish(student))

    def _take_ranking(self) -> None:
        """The ranking that this run made before, so that it goes on with the same layers."""
        path = self.run.folder / RANKING
        if needs_ranking(self.recipe.keep) and not self.recipe.ranking and path.exists():
            order = load_ranking(path, self.teacher, self.recipe.student)
            self.recipe = dataclasses.replace(self.recipe, ranking=order)

    def _whole(self, trained: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """A student that was spread over the processes gathered again; the teacher, spread likewise, is let go of."""
        if self.processes.count > 1:
            from .sharding import is_sharded, whole_model

            if is_sharded(self.__dict__.get("twin") or trained[0]):
                self.__dict__.pop("twin", None)
            return whole_model(trained[0]), trained[1]
        return trained

    def _by_main(self, name: str, work: Callable[[], tuple[Any, dict[str, Any]]]) -> Any:
        """The student after a stage: the main process does and records it, the others read what it has saved."""

        def done() -> Any:
            student, report = work()
            self.run.finish(name, student, report | self._rung(student, name))
            return student

        student = self.processes.only(done)
        if not self.processes.main:
            self.run.read_again()
            student = self._saved_student()
        self.processes.wait()  # the main process may not remove it before all have read it
        return student

    def _saved_student(self) -> Any:
        """The student after the last finished stage; None before the first."""
        folder = self.run.student_folder()
        return None if folder is None else causal_lm_class(self.recipe.student).from_pretrained(folder).float()

    def _publish(self, student: Any) -> None:
        self.run.publish(student.to(self.dtype), self.tokenizer)
        self.run.finish(FINISHED, None, {})

    def _begin(self, name: str, previous: Any, kept: list[int], first: bool) -> tuple[Any, dict[str, Any]]:
        self.progress(name, 0, 1, {})
        student = self.initialise(previous, kept)
        report = {"tokens": 0, "kept": kept}
        if first and (found := self._held_out(self.twin, "teacher")):
            report["teacher_perplexity"] = found
        self.progress(name, 1, 1, {})
        return student, report

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

    def initialise(self, previous: Any, keep: list[int]) -> Any:
        """A student started from the teacher, the layers `keep` attention, and from what was trained before."""
        types = layer_types(self.teacher, self.recipe, keep)
        config = student_config(self.teacher, self.recipe, types)
        student = build_student(self.teacher, self.model, config, self.recipe.student, torch.float32, self.seed)
        if previous is not None:
            continue_from(student, previous)
        return student

    def prepare_data(self) -> None:
        """Makes all rows before the first stage, so that unusable text stops a run before it began."""
        trained = (
            [stage for stage in self.recipe.stages if isinstance(stage, TrainedStage)] if self.recipe.tokens else []
        )
        if any(not stage.own_rows for stage in trained):
            self.packed("training", self.recipe.tokens)
        elif trained or any(isinstance(stage, Calibrate) for stage in self.recipe.stages):
            self.packed("calibration", self.recipe.calibration_tokens)
        for stage in trained:
            if isinstance(stage, Extend) and stage.share:
                self.packed(stage.name, int(self.recipe.tokens * stage.share), stage.length)
            elif isinstance(stage, OwnData):
                from .stages.examples import prepare_examples

                prepare_examples(self, stage)

    def train(
        self,
        trainer_class: type[StageTrainer],
        student: Any,
        stage: TrainedStage,
        part: Part,
        trains: Callable[[str], bool],
        *,
        data: Any = None,
        twin: Any = True,
    ) -> dict[str, Any]:
        """Trains the student in place against a teacher; see `train_stage`.

        Args:
            data: rows; None: those of `part`, of the training text.
            twin: another teacher than the one that is converted; None: no teacher.
        """
        from .stages.training import train_stage

        if data is None:
            data = self.packed("training", self.recipe.tokens).rows(part.rows.start, len(part.rows))
        twin = self.twin if twin is True else twin
        self.__dict__.pop("model", None)  # in float32 and no longer needed; a later step loads it again
        return_freed_memory()
        return train_stage(
            trainer_class,
            student,
            twin,
            stage,
            data,
            self.run.folder / part.name,
            trains=trains,
            batch_tokens=self.recipe.batch_tokens,
            bf16=self.dtype == torch.bfloat16,
            seed=self.seed,
            progress=lambda done, total, info: self.progress(part.name, done, total, info),
            checkpointing=self.checkpointing,
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
        from .data import PackedTokens, TextHashes, refuse_overlap
        from .evaluation import Dataset, evaluate
        from .evaluation.limits import LIMITS

        texts = self.evaluation_texts
        hashes = TextHashes.of(texts, "evaluation")
        for file in sorted((self.run.folder / "data").glob("*.safetensors")):
            refuse_overlap(hashes, PackedTokens.load(file).hashes)
        results = self.results()
        record = {
            "sha256": hashes.sha256,
            "source": self._source(results["conversion"]["data"]),
            "characters": sum(map(len, texts)),
        }
        results["conversion"]["data"]["evaluation"] = record
        write_json(self.run.out / "results.json", results)
        # Beyond the positions that it was trained on, the teacher is no measure of anything.
        window = min(LIMITS["quick"].windows[0], self.teacher.config.max_position_embeddings)
        return evaluate(
            self.run.out,
            teacher=self.teacher,
            datasets=[Dataset.of_texts("held-out text", texts)],
            limits=dataclasses.replace(LIMITS["quick"], windows=(window,)),
            dtype=self.dtype,
            progress=self.progress,
        )
