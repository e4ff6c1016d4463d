"""sft and dpo: what is trained on, the losses by their formulas, stops, and data that is refused."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import yaml

from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.data.chats import chat_tokens, examples, kind_of_source
from rnnzoo.conversions.plan import make_plan
from rnnzoo.conversions.stages.dpo import Dpo
from rnnzoo.conversions.stages.own_data import row_order
from rnnzoo.conversions.stages.sft import Sft
from rnnzoo.kernels.errors import RnnzooError

from ...end_to_end.conftest import write_documents
from ..tiny import tiny_teacher, tiny_tokenizer
from .jobs import LENGTH, OneStage, Stop, changed, random_rows, resolved, stop_at, student_of, weights

WORDS = "the cat sat on a mat while it was raining and birds sang songs of old times near the river".split()
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


def words(number: int, count: int) -> str:
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(count))


def written(path, records) -> str:
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return str(path)


def chats(path, count: int = 24) -> str:
    records = []
    for n in range(count):
        said = [{"role": "user", "content": words(n, 2)}, {"role": "assistant", "content": words(n + 1, 2 + n % 3)}]
        records.append({"messages": said})
    return written(path, records)


def pairs(path, count: int = 12) -> str:
    records = [{"prompt": words(n, 2), "chosen": words(n + 1, 3), "rejected": words(n + 2, 2)} for n in range(count)]
    return written(path, records)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return resolved(tmp_path_factory.mktemp("t"))


class OwnStage(OneStage):
    """With chats or pairs, as the run's folder would hold them, and no text to evaluate on."""

    evaluation_texts = ["nothing of it"]

    def __init__(self, teacher, folder, source, stage, *, length: int = LENGTH, **options):
        super().__init__(teacher, folder, rows=random_rows(1, length), **options)
        self.chat_data = [source]
        stage.prepare(self)


# Tokens of chats -----------------------------------------------------------------------------------------------------


def test_only_what_the_assistant_says_is_learnt_with_the_end_of_its_turn():
    tokenizer = tiny_tokenizer()
    turns = [*TURNS, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    ids, said = chat_tokens(turns, tokenizer)
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(ids) == text
    learnt = tokenizer.decode([token for token, mine in zip(ids, said, strict=True) if mine])
    assert learnt == "Me.<|im_end|>Because.<|im_end|>"


def test_a_template_that_marks_its_turns_is_believed():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %};{% endfor %}"
    )
    ids, said = chat_tokens(TURNS, tokenizer)
    assert tokenizer.decode([token for token, mine in zip(ids, said, strict=True) if mine]) == "Me."


def test_where_the_template_does_not_tell_who_speaks_nothing_is_guessed():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ids, said = chat_tokens(TURNS, tokenizer)
    assert tokenizer.decode(ids) == "2Who?Me." and said is None


# Supervised fine-tuning ----------------------------------------------------------------------------------------------


def sft_loss(student, rows) -> torch.Tensor:
    """Cross-entropy of all labels of the rows, every chat read alone."""
    losses = []
    for row in rows:
        first = 0
        for length in row["seq_lengths"]:
            ids = torch.tensor([row["input_ids"][first : first + length]])
            labels = torch.tensor(row["labels"][first : first + length])
            logits = student(ids, use_cache=False).logits[0, :-1]
            losses.append(F.cross_entropy(logits, labels[1:], reduction="none", ignore_index=-100)[labels[1:] != -100])
            first += length
    return torch.cat(losses).mean()


@pytest.mark.parametrize("mixer", ["hedgehog", "mamba2"])
def test_the_loss_of_packed_chats_is_that_of_chats_alone(teacher, tmp_path, mixer):
    stage = Sft("chat", trains="mixers", lr=1e-3)
    job = OwnStage(teacher, tmp_path, chats(tmp_path / "c.jsonl"), stage, length=64, per_step=3)
    dataset, record = stage.load(job)
    assert record["examples"] == 24 and max(len(lengths) for lengths in dataset["seq_lengths"]) > 1
    student = student_of(teacher, mixer)
    order = row_order(len(dataset), 1, 3, 0)
    with torch.no_grad():
        expected = sft_loss(student, [dataset[n] for n in order[:3]])
    before = weights(student)
    report = job.do(stage, student)
    assert report["loss_first"] == pytest.approx(float(expected), rel=1e-3)
    assert changed(before, student) == {name for name in before if ".mixer." in name}
    assert report["tokens"] == sum(len(dataset[n]["input_ids"]) for n in order)
    assert "forward" not in vars(student) and student.config.pad_token_id == 0


def test_loss_on_all_learns_every_token(teacher, tmp_path):
    stage = Sft("chat", loss_on="all")
    job = OwnStage(teacher, tmp_path, chats(tmp_path / "c.jsonl"), stage)
    for row in stage.load(job)[0]:
        assert row["labels"] == row["input_ids"]


def test_a_share_takes_as_much_as_these_tokens(teacher, tmp_path):
    stage = Sft("chat", share=0.5)
    job = OwnStage(teacher, tmp_path, chats(tmp_path / "c.jsonl"), stage, tokens=400)
    assert 200 <= stage.load(job)[1]["tokens"] < 200 + LENGTH


def test_pairs_of_two_like_answers_or_too_long_ones_are_left_out(teacher, tmp_path):
    records = [{"prompt": "a", "chosen": "b", "rejected": said} for said in ("c", "b", "c" * 500)]
    stage = Dpo("prefer")
    job = OwnStage(teacher, tmp_path, written(tmp_path / "p.jsonl", records), stage, length=128)
    record = stage.load(job)[1]
    assert (record["examples"], record["left_out"]) == (1, 2)


def test_chats_of_the_evaluation_text_are_left_out(teacher, tmp_path):
    shown = " ".join(f"{word}{n}" for n, word in enumerate(WORDS))
    records = [{"messages": [TURNS[0], {"role": "assistant", "content": shown}]}, {"messages": TURNS}]
    stage = Sft("chat")

    class Evaluated(OwnStage):
        evaluation_texts = [shown]

    job = Evaluated(teacher, tmp_path, written(tmp_path / "c.jsonl", records), stage, length=128)
    record = stage.load(job)[1]
    assert (record["examples"], record["left_out"]) == (1, 1)


# Preferences ---------------------------------------------------------------------------------------------------------


def log_probability(student, tokenizer, prompt: str, answer: str) -> torch.Tensor:
    said = [{"role": "user", "content": prompt}]
    first = len(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False))
    ids = tokenizer.apply_chat_template([*said, {"role": "assistant", "content": answer}], return_dict=False)
    logits = student(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids)[1:, None])[first - 1 :].sum()


def test_the_loss_is_that_of_dpo_against_the_student_before(teacher, tmp_path):
    """Of the first pair it is log 2; of the second it follows the formula, with the weights after one step."""
    stage = Dpo("prefer", lr=1e-2, new_lr=1e-2, beta=0.3, batch=1, schedule="constant", warmup=0.0)
    job = OwnStage(teacher, tmp_path, pairs(tmp_path / "p.jsonl", 4), stage, length=128)
    pair = stage.load(job)[0][row_order(4, 1, 1, 0)[1]]
    answers = [pair["prompt"][0]["content"], pair["chosen"][0]["content"], pair["rejected"][0]["content"]]
    student, tokenizer = student_of(teacher), tiny_tokenizer()
    seen = []

    def measure() -> torch.Tensor:
        with torch.no_grad():
            better, worse = (log_probability(student, tokenizer, answers[0], answer) for answer in answers[1:])
        return better - worse

    seen.append(measure())
    job.progress = lambda stage, done, total, info: seen.append(measure()) if info else None
    report = job.do(stage, student)
    assert report["loss_first"] == pytest.approx(0.693147, abs=1e-5) and report["examples"] == 4
    lines = [json.loads(line) for line in (tmp_path / "prefer" / "metrics.jsonl").read_text().splitlines()]
    expected = -F.logsigmoid(0.3 * (seen[1] - seen[0]))
    assert lines[1]["loss"] == pytest.approx(float(expected), abs=1e-3)
    assert abs(lines[1]["loss"] - 0.693147) > 1e-3


@pytest.mark.parametrize(
    ("stage", "source"),
    [
        (Sft("chat", epochs=2, lr=1e-3, new_lr=1e-3), chats),
        (Dpo("prefer", lr=1e-3, new_lr=1e-3, beta=0.1, batch=2), pairs),
        (Dpo("prefer", lr=1e-2, beta=0.1, batch=2, trains="lora"), pairs),
    ],
)
def test_a_stopped_stage_ends_at_the_same_weights(teacher, tmp_path, stage, source):
    given = source(tmp_path / "data.jsonl")
    whole, again = student_of(teacher), student_of(teacher)
    expected = OwnStage(teacher, tmp_path / "whole", given, stage, length=64).do(stage, whole)
    with pytest.raises(Stop):
        stopping = OwnStage(
            teacher, tmp_path / "cut", given, stage, length=64, callback=stop_at(expected["tokens"] // 2)
        )
        stopping.do(stage, student_of(teacher))
    assert any((tmp_path / "cut" / stage.name).glob("checkpoint-*"))
    report = OwnStage(teacher, tmp_path / "cut", given, stage, length=64).do(stage, again)
    assert not changed(weights(whole), again)
    same = ("tokens", "loss_first", "loss_last")
    assert {name: report[name] for name in same} == {name: expected[name] for name in same}
    assert changed(weights(student_of(teacher)), again)


# Data ----------------------------------------------------------------------------------------------------------------


def test_records_of_several_shapes_are_read(tmp_path):
    shared = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    records = [{"messages": TURNS}, {"conversations": shared}, {"prompt": "Who?", "completion": "Me."}]
    found = list(examples([written(tmp_path / "c.jsonl", records)], "chat"))
    assert found == [{"messages": TURNS}] * 3
    other = {"role": "assistant", "content": "You."}
    records = [
        {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
        {"chosen": TURNS, "rejected": [TURNS[0], other]},
    ]
    found = list(examples([written(tmp_path / "p.jsonl", records)], "preference"))
    assert found == [{"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [other]}] * 2


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("chat", {"text": "Who?"}, "c.jsonl, line 2 is no chat: it has text, but not messages"),
        ("chat", {"messages": TURNS[:1]}, "line 2 has no turn of the assistant"),
        ("chat", {"messages": [{"role": "user"}]}, "line 2: a turn must have a role and a content"),
        ("chat", [1], "line 2 is list, not an object"),
        ("chat", "{", "line 2 is not JSON"),
        ("preference", {"messages": TURNS}, "line 2 is no preference: it has messages"),
        ("preference", {"chosen": TURNS, "rejected": TURNS[1:]}, "line 2: a preference needs a prompt"),
    ],
)
def test_a_record_that_is_not_of_the_kind_is_told(tmp_path, kind, record, message):
    good = {"messages": TURNS} if kind == "chat" else {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}
    with pytest.raises(RnnzooError) as raised:
        list(examples([written(tmp_path / "c.jsonl", [good, record])], kind))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_given_goes_to_the_stages_of_its_kind(tmp_path):
    given = [pairs(tmp_path / "p.jsonl"), chats(tmp_path / "c.jsonl")]
    assert [kind_of_source(source) for source in given] == ["preference", "chat"]
    assert Sft("chat").sources(given) == given[1:] and Dpo("prefer").sources(given) == given[:1]
    assert Sft("chat", data="mine.jsonl").sources(given) == ["mine.jsonl"]
    with pytest.raises(RnnzooError, match="The stage prefer needs preferences of its own"):
        Dpo("prefer").sources(given[1:])
    plain = tmp_path / "plain.txt"
    plain.write_text("Who?\n")
    with pytest.raises(RnnzooError, match=r"plain.txt is plain text; records are needed here"):
        kind_of_source(str(plain))


# Through convert -----------------------------------------------------------------------------------------------------


RECIPE = {"student": "supra", "tokens": 256, "seq_len": 64, "batch_tokens": 128, "calibration_tokens": 64}
STAGES = [
    {"name": "distill", "kind": "train", "share": 0.5},
    {"name": "longer", "kind": "extend", "share": 0.5, "length": 128, "chunk": 32},
    {"name": "chat", "kind": "sft"},
    {"name": "prefer", "kind": "dpo", "batch": 4},
]


def recipe(tmp_path, **changes) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"stages": STAGES} | changes))
    return str(path)


def test_all_kinds_of_stages_in_one_conversion(tmp_path):
    text = str(write_documents(tmp_path / "text.jsonl", 60))
    given = [chats(tmp_path / "c.jsonl"), pairs(tmp_path / "p.jsonl")]
    out, options = tmp_path / "out", dict(data=[text], dtype="float32", evaluate=False)
    name = str(tiny_teacher("llama", tmp_path))
    mine = recipe(tmp_path, stages=[*STAGES[:3], STAGES[3] | {"data": given[1]}])
    results = convert(name, mine, out, chat_data=given, **options)
    stages = {stage["name"]: stage for stage in results["conversion"]["stages"]}
    assert list(stages) == ["initialise", "distill", "longer", "chat", "prefer"]
    assert (stages["distill"]["tokens"], stages["longer"]["tokens"]) == (128, 128)
    assert (stages["chat"]["examples"], stages["prefer"]["examples"]) == (24, 12)
    assert set(results["conversion"]["data"]) == {"calibration", "training", "longer", "chat", "prefer"}
    assert "data: p.jsonl" in results["recipe"]["yaml"]  # not where it lies on this machine
    with pytest.raises(RnnzooError, match="holds a run with other settings"):
        convert(name, mine, out, chat_data=given[::-1], **options)


@pytest.mark.parametrize(
    ("changes", "chat_data", "message"),
    [
        ({}, None, "stage chat: The stage chat needs chats of its own"),
        ({}, ["bad.jsonl"], "stage chat: .*bad.jsonl, line 1 is neither a chat"),
        ({"stages": STAGES[:1]}, ["c.jsonl"], "--chat-data is for stages of kind sft and dpo"),
        ({"stages": [STAGES[2] | {"data": "gone.jsonl"}]}, None, "There is no file or folder .*gone.jsonl"),
        ({"stages": [STAGES[0] | {"cache_top_k": 320}]}, None, "cache_top_k is 320, but the vocabulary has 320"),
        ({"stages": [STAGES[0] | {"trains": "lora", "lora_targets": ["x"]}]}, None, "no matrix 'x' for LoRA"),
        ({"stages": [STAGES[0] | {"teacher": "./gone"}]}, None, "There is no folder ./gone"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_written(tmp_path, monkeypatch, changes, chat_data, message):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "bad.jsonl", [{"text": "no chat"}])
    chats(tmp_path / "c.jsonl")
    with pytest.raises(RnnzooError, match=message) as raised:
        convert(
            str(tiny_teacher("llama", tmp_path)), recipe(tmp_path, **changes), tmp_path / "out", chat_data=chat_data
        )
    assert not (tmp_path / "out").exists() and "\n" not in str(raised.value)


def test_plan_counts_the_tokens_of_the_stages_own_data(tmp_path):
    name = str(tiny_teacher("llama", tmp_path))
    given = [chats(tmp_path / "c.jsonl"), pairs(tmp_path / "p.jsonl")]

    def tokens(chat_data, **changes):
        plan = make_plan(name, recipe(tmp_path, **changes), chat_data=chat_data).to_dict()
        return {stage["stage"]: stage["tokens"] for stage in plan["stages"]}

    texts = [example["messages"] for example in examples(given[:1], "chat")]
    characters = sum(len(turn["content"]) for turns in texts for turn in turns)
    found = tokens(given)
    assert (found["distill"], found["longer"], found["chat"]) == (128, 128, characters // 4) and found["prefer"] > 0
    assert tokens(None)["chat"] is None
    shares = [STAGES[2] | {"share": 0.25, "data": given[0]}]
    assert tokens(None, stages=shares) == {"chat": 64}
