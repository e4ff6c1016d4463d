"""The stages of a conversion in their order: what is finished is not done again, and what was cut off goes on.

Stages are known by their interface alone, see `stages/base.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from ..zoo.core.sizes import causal_lm_class
from .context import StageContext, StageRun
from .mapped_layers import MappedStudents
from .ranking import load_ranking, rank_layers, save_ranking
from .recipes import keep_steps, parse_keep
from .recipes.keep import needs_ranking, stage_steps, stage_tokens
from .run_folder import FINISHED, RANKING, Run
from .sharding import is_sharded, whole_model
from .stages import Stage
from .stages.ladder import held_out_perplexity

__all__ = ["Pipeline"]


class WholeStudents:
    """Where the student is kept between stages: in memory, and in the run's folder for a restart."""

    def __init__(self, run: Run, context: StageContext):
        self.run, self.context = run, context

    def begin(self, previous: Any, kept: list[int]) -> Any:
        """A student of which the layers `kept` are attention, with what the `previous` one has been trained to."""
        return self.context.initialise(previous, kept)

    def saved(self) -> Any:
        """The student after the last finished stage; None before the first."""
        folder = self.run.student_folder()
        if folder is None:
            return None
        return causal_lm_class(self.context.recipe.student).from_pretrained(folder).float()

    def finish(self, name: str, student: Any, report: dict[str, Any]) -> None:
        """Records a stage, and the student after it."""
        self.run.finish(name, student, report)

    def publish(self, student: Any) -> None:
        """The finished model into OUT."""
        self.run.publish(student.to(self.context.dtype), self.context.tokenizer, self.context.generation)
        self.run.finish(FINISHED, None, {})


class Pipeline:
    """A run and its stages.

    Args:
        offload: one layer in memory at a time, see `mapped_layers.py`.
        ladder: measure the student after each stage, and the teacher.
    """

    def __init__(self, run: Run, context: StageContext, *, offload: bool = False, ladder: bool = False):
        self.run, self.context, self.ladder = run, context, ladder
        self.students = (MappedStudents if offload else WholeStudents)(run, context)
        self.processes = context.processes
        self._take_ranking()

    def complete(self) -> None:
        """All stages that are not finished yet, and the model in OUT."""
        context, processes = self.context, self.processes
        layers = context.teacher.config.num_hidden_layers
        processes.first(context.teacher.fetch)
        student = self.students.saved()
        processes.first(self._prepare)
        if needs_ranking(context.recipe.keep) and not context.recipe.ranking:
            processes.only(lambda: save_ranking(self.run.folder / RANKING, rank_layers(context)))
            self._take_ranking()
        steps = [parse_keep(keep, layers) for keep in keep_steps(context.recipe, layers)]
        used: dict[str, int] = {}
        for number, kept in enumerate(steps):
            prefix = f"{number + 1}-" if len(steps) > 1 else ""
            name = f"{prefix}initialise"
            if self.run.record(name) is None:
                begin = functools.partial(self._begin, name, student, kept, first=number == 0)
                student = self._by_main(name, begin)
            fresh = sorted(set(steps[number - 1] if number else range(layers)) - set(kept))
            for stage in context.recipe.stages:
                if stage_steps(context.recipe, stage, layers)[number]:
                    tokens = stage_tokens(context.recipe, stage, layers)[number]
                    student = self._stage(stage, student, prefix, tokens, fresh, used)
        processes.only(lambda: self.students.publish(student))

    def _stage(
        self, stage: Stage, student: Any, prefix: str, tokens: int, fresh: list[int], used: dict[str, int]
    ) -> Any:
        """The student after a stage.

        Args:
            tokens: of its share of the text. used: rows that were given out, by the text that they are of; changed.
        """
        rows = max(1, tokens // stage.row_length(self.context.recipe)) if tokens else 0
        text = stage.name if stage.own_rows else "training"
        first = used.get(text, 0)
        used[text] = first + rows
        stage_run = StageRun(f"{prefix}{stage.name}", range(first, first + rows), fresh)
        if self.run.record(stage_run.name) is not None or not stage.takes(self.context.recipe, rows):
            return student
        work = functools.partial(stage.run, self.context, student, stage_run)
        if stage.together:
            trained = self._whole(work())
            work = lambda: trained  # noqa: E731
        return self._by_main(stage_run.name, work)

    def _prepare(self) -> None:
        _ = self.context.generation  # a damaged file is told now, not when the work is done
        for stage in self.context.recipe.stages:
            stage.prepare(self.context)

    def _take_ranking(self) -> None:
        """The ranking that this run made before, so that it goes on with the same layers."""
        context, path = self.context, self.run.folder / RANKING
        if needs_ranking(context.recipe.keep) and not context.recipe.ranking and path.exists():
            order = load_ranking(path, context.teacher, context.recipe.student)
            context.recipe = dataclasses.replace(context.recipe, ranking=order)

    def _whole(self, trained: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """A student that was spread over the processes gathered again; the teacher, spread likewise, is let go of."""
        student, report = trained
        if self.processes.count == 1:
            return trained
        if is_sharded(self.context.__dict__.get("teacher_model") or student):
            self.context.release_teacher_model()
        return whole_model(student), report

    def _by_main(self, name: str, work: Callable[[], tuple[Any, dict[str, Any]]]) -> Any:
        """The student after a stage: the main process does and records it, the others read what it has saved."""

        def done() -> Any:
            student, report = work()
            names = {"value": "perplexity", "stderr": "perplexity_stderr", "tokens": "perplexity_tokens"}
            found = {names[key]: value for key, value in self._held_out(student, name).items()}
            self.students.finish(name, student, report | found)
            return student

        student = self.processes.only(done)
        if not self.processes.main:
            self.run.read_again()
            student = self.students.saved()
        self.processes.wait()  # the main process may not remove it before all have read it
        return student

    def _begin(self, name: str, previous: Any, kept: list[int], first: bool) -> tuple[Any, dict[str, Any]]:
        self.context.progress(name, 0, 1, {})
        student = self.students.begin(previous, kept)
        report: dict[str, Any] = {"tokens": 0, "kept": kept}
        if first and self.ladder and (found := self._held_out(self.context.teacher_model, "teacher")):
            report["teacher_perplexity"] = found
        self.context.progress(name, 1, 1, {})
        return student, report

    def _held_out(self, model: Any, name: str) -> dict[str, Any]:
        """Perplexity on held-out text, if it is asked for."""
        if not self.ladder:
            return {}
        return held_out_perplexity(
            model,
            self.context.tokenizer,
            self.context.evaluation_texts,
            window=self.context.recipe.seq_len,
            bf16=self.context.bf16,
            progress=lambda done, total: self.context.progress(f"{name}, held-out text", done, total, {}),
        )
