"""Another teacher than the one that is converted: larger, but with the same tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...kernels.errors import RnnzooError
from ..data import check_sequence_length
from ..student import attention_twin
from ..teachers import resolve_teacher

if TYPE_CHECKING:
    from ..job import Job
    from ..recipes.stages import Distilled
    from ..teachers import TeacherRef

__all__ = ["check_other_teacher", "check_same_tokenizer", "twin_of"]


def twin_of(job: Job, stage: Distilled) -> Any:
    """The teacher of a stage in the zoo's block, every layer attention, in the dtype of the run."""
    if stage.teacher is None:
        return job.twin
    found = resolve_teacher(stage.teacher)
    return attention_twin(found, found.load(job.dtype), job.dtype)


def check_other_teacher(stage: Distilled, seq_len: int) -> TeacherRef:
    """The stage's own teacher; reads no weights.

    Raises:
        RnnzooError: it cannot be found, or was trained on shorter texts than it will be given.
    """
    found = resolve_teacher(stage.teacher)
    if stage.kind == "train":  # an extend stage asks it no further than it was trained
        check_sequence_length(seq_len, found.config, f"the teacher {found.name}")
    return found


def check_same_tokenizer(other: TeacherRef, teacher: TeacherRef) -> None:
    """Refuses a teacher whose tokens are not those of the teacher that is converted.

    Raises:
        RnnzooError: names a token in which they differ.
    """
    theirs, ours = other.tokenizer().get_vocab(), teacher.tokenizer().get_vocab()
    if theirs == ours:
        return
    differing = min((token for token in {*theirs, *ours} if theirs.get(token) != ours.get(token)), key=_place(ours))
    numbers = [f"number {vocab[differing]}" if differing in vocab else "unknown" for vocab in (theirs, ours)]
    raise RnnzooError(
        f"the teacher {other.name} has another tokenizer than {teacher.name} (the token {differing!r} is {numbers[0]} "
        f"to the one and {numbers[1]} to the other), so that their predictions cannot be compared; choose one of the "
        "same family."
    )


def _place(vocabulary: dict[str, int]) -> Any:
    return lambda token: (vocabulary.get(token, len(vocabulary)), token)
