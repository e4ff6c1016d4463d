"""Several models answer one prompt, a step at a time in turn, and say at each step how far they are.

They share one machine, so they are not run at once: it is always the turn of the one that has computed for the least
time so far. Each model's speed is therefore its own, and the faster one gets ahead as it would if both were alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..conversions.evaluation.columns import StateSize
from ..conversions.evaluation.scoring import Stream, log_probs
from ..kernels.errors import RnnzooError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Sampling", "Snapshot", "Speaker", "side_by_side"]

READ_AT_ONCE = 256  # tokens of the prompt; between two pieces the other model has its turn, and a stop is heeded


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token each time. top_p: 1 for no bound. top_k: 0 for no bound.
        repetition_penalty: 1 for none. max_new_tokens: at least 1. seed: of the drawing, the same for every model.

    Raises:
        RnnzooError: a value out of its range.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest, highest in (
            ("temperature", 0, 10),
            ("top_p", 1e-3, 1),
            ("top_k", 0, 10**6),
            ("repetition_penalty", 0.1, 10),
            ("max_new_tokens", 1, 10**6),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            whole = isinstance(getattr(type(self), name), int)
            if not isinstance(value, int if whole else (int, float)) or not lowest <= value <= highest:
                kind = "a whole number" if whole else "a number"
                raise RnnzooError(f"{name} is {value!r}; give {kind} from {lowest:g} to {highest:g}.")

    def chooser(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(ids so far (1, T), log probabilities (1, vocab)) -> the next token (1, 1)."""
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        steps: Any = LogitsProcessorList()
        if self.repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature > 0:
            steps.append(TemperatureLogitsWarper(float(self.temperature)))
            steps += [TopKLogitsWarper(self.top_k)] if self.top_k else []
            steps += [TopPLogitsWarper(float(self.top_p))] if self.top_p < 1 else []
        generators: dict[torch.device, torch.Generator] = {}

        def choose(ids: Tensor, scores: Tensor) -> Tensor:
            scores = steps(ids, scores)
            if self.temperature == 0:
                return scores.argmax(-1, keepdim=True)
            if scores.device not in generators:
                generators[scores.device] = torch.Generator(scores.device).manual_seed(self.seed)
            return torch.multinomial(scores.softmax(-1), 1, generator=generators[scores.device])

        return choose


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """How far a model is.

    Attributes:
        phase: "reading", "answering", or how it ended: "end" (of the text), "length", "stopped".
        text: the answer so far. prompt_tokens: the prompt's. read_tokens: of these read. new_tokens: of the answer.
        read_seconds, answer_seconds: of this model's own computing. state_bytes: of its memory now.
    """

    phase: str = "reading"
    text: str = ""
    prompt_tokens: int = 0
    read_tokens: int = 0
    new_tokens: int = 0
    read_seconds: float = 0.0
    answer_seconds: float = 0.0
    state_bytes: int = 0

    @property
    def running(self) -> bool:
        return self.phase in ("reading", "answering")

    @property
    def tokens(self) -> int:
        """Tokens that the memory holds or stands for."""
        return self.read_tokens + self.new_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Of the answer, without the first token, which the reading gives; None before the second."""
        return (self.new_tokens - 1) / self.answer_seconds if self.new_tokens > 1 and self.answer_seconds else None


class Speaker:
    """A model with its tokenizer, that answers.

    Args:
        name: what to call it. role: "student" or "teacher".
    """

    def __init__(self, name: str, role: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.name, self.role, self.model, self.tokenizer = name, role, model, tokenizer
        with torch.inference_mode():
            self.memory = StateSize(model)  # .at(tokens): bytes
            # What is compiled or set up at the first token would count as this model's slowness.
            stream = Stream(model)
            for length in (8, 1):
                log_probs(model, stream.advance(torch.zeros(1, length, dtype=torch.long, device=model.device))[:, -1])

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def encode(self, prompt: str, system: str = "", chat: bool = False) -> Tensor:
        """Token ids (1, T) of a prompt, as a user's message with `chat`, else as a text to go on from."""
        if not chat:
            ids: Any = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        else:
            messages = [{"role": "system", "content": system}] if system.strip() else []
            messages.append({"role": "user", "content": prompt})
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]  # type: ignore[index]
        return ids.to(self.model.device)

    def answer(self, ids: Tensor, sampling: Sampling) -> Iterator[Snapshot]:
        """Reads ids (1, T) in pieces, then writes; a snapshot after each piece and each token. The last one is not
        `running`."""
        stream, choose, ends = Stream(self.model), sampling.chooser(), self._end_tokens()
        now = Snapshot(prompt_tokens=ids.shape[1])
        hidden, token = None, ids[:, :0]
        for piece in ids.split(READ_AT_ONCE, dim=1):
            started = time.perf_counter()
            with torch.inference_mode():
                hidden = stream.advance(piece)[:, -1]
                if now.read_tokens + piece.shape[1] == ids.shape[1]:
                    token = choose(ids, log_probs(self.model, hidden))
                    token.item()  # waits for the device
            now = dataclasses.replace(
                now,
                read_tokens=now.read_tokens + piece.shape[1],
                read_seconds=now.read_seconds + time.perf_counter() - started,
                state_bytes=stream.state_bytes(),
            )
            yield now
        new: list[int] = []
        while True:
            if (last := int(token.item())) in ends:
                yield dataclasses.replace(now, phase="end")
                return
            new.append(last)
            ids = torch.cat([ids, token], 1)
            now = dataclasses.replace(now, phase="answering", text=self._decode(new), new_tokens=len(new))
            if len(new) >= sampling.max_new_tokens:
                yield dataclasses.replace(now, phase="length")
                return
            yield now
            started = time.perf_counter()
            with torch.inference_mode():
                token = choose(ids, log_probs(self.model, stream.advance(token)[:, -1]))
                token.item()
            seconds = now.answer_seconds + time.perf_counter() - started
            now = dataclasses.replace(now, answer_seconds=seconds, state_bytes=stream.state_bytes())

    def _decode(self, ids: list[int]) -> str:
        # A character in several tokens is not shown before it is whole.
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\ufffd")

    def _end_tokens(self) -> set[int]:
        settings = getattr(self.model, "generation_config", None)
        ends = getattr(settings, "eos_token_id", None)
        found = set(ends) if isinstance(ends, list | tuple) else {ends}
        return {int(token) for token in (*found, self.tokenizer.eos_token_id) if token is not None}  # type: ignore[arg-type]


def side_by_side(
    speakers: Sequence[Speaker],
    prompt: str,
    sampling: Sampling,
    *,
    system: str = "",
    chat: bool | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Snapshot, ...]]:
    """All speakers' snapshots, after each step of one of them, until none is running.

    Args:
        chat: the prompt as a user's message; None: where every speaker has a chat template.
        stop: asked before each step; the answers end there when it says True.

    Raises:
        RnnzooError: the prompt is empty, or `chat` without a chat template.
    """
    if not prompt.strip():
        raise RnnzooError("The prompt is empty; write something to answer or to go on from.")
    without = [speaker.name for speaker in speakers if not speaker.has_chat_template]
    if chat and without:
        raise RnnzooError(f"{' and '.join(without)} has no chat template; switch chat off.")
    chat = not without if chat is None else chat
    encoded = [speaker.encode(prompt, system, chat) for speaker in speakers]
    answers = [speaker.answer(ids, sampling) for speaker, ids in zip(speakers, encoded, strict=True)]
    now = [Snapshot(prompt_tokens=ids.shape[1]) for ids in encoded]
    yield tuple(now)
    while running := [i for i, snapshot in enumerate(now) if snapshot.running]:
        if stop():
            yield tuple(dataclasses.replace(s, phase="stopped") if s.running else s for s in now)
            return
        turn = min(running, key=lambda i: now[i].read_seconds + now[i].answer_seconds)
        now[turn] = next(answers[turn])
        yield tuple(now)
