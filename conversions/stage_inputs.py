"""What stages need besides the teacher and the text: other teachers, chats, libraries. Checked before a run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..kernels.errors import RnnzooError
from ..zoo.core.sizes import causal_lm_class
from .recipes.stages import Distilled, EndToEnd, OwnData, Train

if TYPE_CHECKING:
    from ..zoo.core.configuration import RecurrentConfig
    from .recipes import Recipe
    from .recipes.stages import Stage
    from .teachers import TeacherRef

__all__ = ["check_end_to_end", "check_inputs"]


def check_end_to_end(stage: Stage, recipe: Recipe, config: RecurrentConfig) -> None:
    """Refuses what can be told from configurations alone.

    Args:
        config: of the student.
    Raises:
        RnnzooError: without the name of the stage.
    """
    if isinstance(stage, EndToEnd) and stage.trains == "lora":
        from .stages.lora import check_lora

        with torch.device("meta"):
            check_lora(stage, causal_lm_class(recipe.student)(config))
    if isinstance(stage, Distilled) and stage.teacher is not None:
        from .stages.other_teacher import check_other_teacher

        check_other_teacher(stage, recipe.seq_len)
    if isinstance(stage, Train) and stage.cache_top_k >= config.vocab_size:
        raise RnnzooError(
            f"cache_top_k is {stage.cache_top_k}, but the vocabulary has {config.vocab_size} tokens; keep fewer, "
            "such as 64, or leave it out."
        )


def check_inputs(recipe: Recipe, teacher: TeacherRef, chat_data: list[str] | None, look: bool) -> dict[str, Any]:
    """Looks at what the stages that train will read; returns what identifies it, for the run's record.

    Args:
        chat_data: sources of chats and preferences for stages that name none. look: at the data as well; it is in the
            run already where one goes on.
    Raises:
        RnnzooError: names the stage.
    """
    found: dict[str, Any] = {}
    trained = [stage for stage in recipe.stages if recipe.tokens and isinstance(stage, EndToEnd)]
    for stage in trained:
        try:
            if isinstance(stage, Distilled) and stage.teacher is not None:
                from .stages.other_teacher import check_other_teacher, check_same_tokenizer

                other = check_other_teacher(stage, recipe.seq_len)
                check_same_tokenizer(other, teacher)
                found.setdefault("teachers", {})[stage.name] = other.sha
            if isinstance(stage, OwnData) and look:
                from .data.chats import check_template
                from .stages.examples import check_examples

                check_template(teacher.tokenizer(), teacher.name)
                check_examples(stage, chat_data)
        except RnnzooError as error:
            raise RnnzooError(f"The recipe {recipe.name}, stage {stage.name}: {error}") from error
    if chat_data:
        if not any(isinstance(stage, OwnData) and stage.data is None for stage in recipe.stages):
            raise RnnzooError(
                f"--chat-data is for stages of kind sft and dpo without data of their own, and the recipe "
                f"{recipe.name} has none; leave it out."
            )
        found["chat_data"] = chat_data
    return found
