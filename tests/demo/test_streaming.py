"""Two models answer one prompt in turn: equal to what each says alone, with its own time and its own memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rnnzoo.demo import streaming
from rnnzoo.demo.streaming import Sampling, Snapshot, Speaker, side_by_side
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.mamba2.configuration_mamba2 import Mamba2Config
from rnnzoo.zoo.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from ..conversions.tiny import tiny_model, tiny_tokenizer

GREEDY = Sampling(temperature=0, max_new_tokens=12)
PROMPT = "the sea and the river in winter"


def recurrent(**changes) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2}
    return Mamba2ForCausalLM(Mamba2Config(**(sizes | changes))).eval()


@pytest.fixture(scope="module")
def student() -> Speaker:
    return Speaker("little", "student", recurrent(), tiny_tokenizer())


@pytest.fixture(scope="module")
def teacher() -> Speaker:
    return Speaker("large", "teacher", tiny_model("llama"), tiny_tokenizer())


def last(answers) -> tuple[Snapshot, ...]:
    *_, final = answers
    return final


@pytest.mark.parametrize("chat", [False, True])
def test_each_says_what_generate_says(student, teacher, chat):
    final = last(side_by_side([student, teacher], PROMPT, GREEDY, chat=chat))
    for speaker, snapshot in zip((student, teacher), final, strict=True):
        ids = speaker.encode(PROMPT, chat=chat)
        tokens = speaker.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        said = speaker.tokenizer.decode(tokens, skip_special_tokens=True)
        assert snapshot.text == said.rstrip("\ufffd") and snapshot.prompt_tokens == ids.shape[1]
        assert snapshot.phase in ("length", "end")


def test_the_text_only_grows_and_the_figures_go_with_it(student, teacher):
    steps = list(side_by_side([student, teacher], PROMPT, GREEDY, chat=False))
    for before, after in zip(steps, steps[1:], strict=False):
        changed = [i for i in range(2) if before[i] != after[i]]
        assert len(changed) == 1, "one model at a time"
        old, new = before[changed[0]], after[changed[0]]
        assert new.text.startswith(old.text) and new.new_tokens >= old.new_tokens
        assert new.read_seconds >= old.read_seconds and new.answer_seconds >= old.answer_seconds
    assert [snapshot.running for snapshot in steps[0]] == [True, True]
    assert [snapshot.running for snapshot in steps[-1]] == [False, False]
    final = steps[-1][0]
    assert final.tokens_per_second == pytest.approx(11 / final.answer_seconds)
    assert steps[0][0].tokens_per_second is None


def test_the_state_keeps_its_size_and_the_cache_grows(student, teacher):
    sizes: list[set[int]] = [set(), set()]
    for now in side_by_side([student, teacher], PROMPT, GREEDY, chat=False):
        for seen, snapshot in zip(sizes, now, strict=True):
            seen.update([snapshot.state_bytes] if snapshot.read_tokens == snapshot.prompt_tokens else [])
    assert len(sizes[0]) == 1 and len(sizes[1]) == 12
    # Two layers, two key-value heads of 8 channels, keys and values, four bytes; the last token is never read.
    final = last(side_by_side([student, teacher], PROMPT, GREEDY, chat=False))[1]
    per_token = 2 * 2 * 8 * 2 * 4
    assert final.state_bytes == per_token * (final.tokens - 1) == teacher.memory.at(final.tokens - 1)
    assert sizes[0] == {student.memory.at(10)} == {student.memory.at(30000)}


def test_the_turn_is_that_of_the_one_that_has_computed_less(student, teacher, monkeypatch):
    """With a clock on which a step of the student takes 1 s and one of the teacher 3 s, it gets three times as far."""
    clock = [0.0]
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: clock[0])

    def slow(speaker: Speaker, seconds: float) -> None:
        def advance(*args, **kwargs):
            clock[0] += seconds
            return forward(*args, **kwargs)

        forward = speaker.model.base_model.forward
        monkeypatch.setattr(speaker.model.base_model, "forward", advance)

    slow(student, 1.0)
    slow(teacher, 3.0)
    many = dataclasses.replace(GREEDY, max_new_tokens=40)
    monkeypatch.setattr(Speaker, "_end_tokens", lambda self: set())
    for now in side_by_side([student, teacher], PROMPT, many, chat=False):
        if now[0].new_tokens == 36:
            break
    assert 11 <= now[1].new_tokens <= 13
    assert now[0].tokens_per_second == 1 and now[1].tokens_per_second == pytest.approx(1 / 3)


def test_a_stop_ends_both_where_they_are(student, teacher):
    asked = iter([False] * 9 + [True])
    steps = list(side_by_side([student, teacher], PROMPT, GREEDY, chat=False, stop=lambda: next(asked)))
    assert len(steps) == 11 and {snapshot.phase for snapshot in steps[-1]} == {"stopped"}
    assert [snapshot.text for snapshot in steps[-1]] == [snapshot.text for snapshot in steps[-2]]


def test_a_long_prompt_is_read_in_pieces_that_are_shown_and_can_be_stopped(student):
    prompt = "the sea " * 400
    steps = [now[0] for now in side_by_side([student], prompt, GREEDY, chat=False)]
    read = [snapshot.read_tokens for snapshot in steps if snapshot.phase == "reading"]
    assert read[:3] == [0, 256, 512] and read[-1] == steps[0].prompt_tokens > 512
    whole = student.model.generate(student.encode(prompt), max_new_tokens=12, do_sample=False)
    assert steps[-1].text == student.tokenizer.decode(whole[0, read[-1] :], skip_special_tokens=True).rstrip("\ufffd")
    asked = iter([False, True])
    stopped = last(side_by_side([student], prompt, GREEDY, chat=False, stop=lambda: next(asked)))[0]
    assert stopped.phase == "stopped" and stopped.read_tokens == 256


def test_the_end_of_the_text_ends_the_answer(student):
    first = student.model.generate(student.encode(PROMPT), max_new_tokens=3, do_sample=False)[0, -1].item()
    settings = student.model.generation_config
    settings.eos_token_id, kept = [first, 5], settings.eos_token_id
    try:
        final = last(side_by_side([student], PROMPT, GREEDY, chat=False))[0]
    finally:
        settings.eos_token_id = kept
    assert final.phase == "end" and final.new_tokens <= 2


def test_sampling_settings_hold(student):
    def answer(**changes) -> str:
        sampling = Sampling(**({"max_new_tokens": 24, "temperature": 1.0} | changes))
        return last(side_by_side([student], PROMPT, sampling, chat=False))[0].text

    greedy = answer(temperature=0)
    assert answer(seed=1) == answer(seed=1) != answer(seed=2)
    assert answer(top_k=1) == answer(top_p=1e-3) == greedy
    assert answer(temperature=0, repetition_penalty=5.0) != greedy
    ids = student.encode(PROMPT)
    tokens = student.model.generate(ids, max_new_tokens=24, do_sample=False, repetition_penalty=5.0)
    said = student.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer(temperature=0, repetition_penalty=5.0) == said.rstrip("\ufffd")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": -1}, "temperature is -1; give a number from 0 to 10"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k is 1.5; give a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": None}, "seed"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    with pytest.raises(RnnzooError, match=words):
        Sampling(**changes)


def test_an_empty_prompt_and_a_chat_without_template_are_refused(student, teacher):
    with pytest.raises(RnnzooError, match="prompt is empty"):
        list(side_by_side([student], "  ", GREEDY))
    plain = Speaker("plain", "teacher", teacher.model, tiny_tokenizer())
    plain.tokenizer.chat_template = None
    with pytest.raises(RnnzooError, match="plain has no chat template"):
        list(side_by_side([student, plain], PROMPT, GREEDY, chat=True))
    # By default then neither is asked in chat, so that both read the same.
    now = next(iter(side_by_side([student, plain], PROMPT, GREEDY)))
    assert now[0].prompt_tokens == now[1].prompt_tokens == student.encode(PROMPT).shape[1]


def test_system_message_and_template_reach_the_model(student):
    ids = student.encode("who", system="be brief", chat=True)
    text = student.tokenizer.decode(ids[0])
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>") and text.endswith("<|im_start|>assistant\n")


def test_a_character_in_several_tokens_is_shown_when_it_is_whole(student):
    ids = student.tokenizer("x\N{SNOWMAN}", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    assert [student._decode(ids[:n]) for n in (1, 2, 3, 4)] == ["x", "x", "x", "x\N{SNOWMAN}"]
