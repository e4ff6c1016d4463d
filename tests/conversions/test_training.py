"""Training stages: the losses are what they say, and a stopped stage ends at the same weights."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.stages import KINDS, training
from rnnzoo.conversions.stages.align import AlignLayers, aligned_parameters
from rnnzoo.conversions.stages.parameters import parts_of
from rnnzoo.conversions.stages.train import Train, TrainEndToEnd
from rnnzoo.conversions.stages.training import next_tokens, train_stage
from rnnzoo.conversions.student import build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher

from .tiny import tiny_teacher

LENGTH = 32
LOSSES = {"kl": 0.5, "ce": 0.5, "trains": "all"}


def some_rows(count: int = 8, documents: int = 1) -> PackedTokens:
    ids = torch.randint(3, 310, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    seq_ids = torch.arange(LENGTH) * documents // LENGTH
    return PackedTokens(ids, seq_ids.expand_as(ids), "test", TextHashes("test"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    ref = resolve_teacher(str(tiny_teacher("llama", tmp_path_factory.mktemp("t"))))
    return ref, ref.load()


@pytest.fixture(scope="module")
def teacher_model(teacher):
    return zoo_teacher(*teacher, torch.float32)


def student_of(teacher, mixer: str = "hedgehog", keep=()):
    ref, model = teacher
    options = {"feature_map": "prototype", "feature_width": 4, "window_size": 4} if mixer == "hedgehog" else {}
    recipe = Recipe("test", mixer, [], student_options=options)
    config = student_config(ref, recipe, layer_types(ref, recipe, list(keep)))
    return build_student(ref, model, config, mixer, torch.float32, 0)


def trainer_of(cls, student, teacher_model, folder, **stage):
    arguments = training.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    stage = KINDS["align" if cls is AlignLayers else "train"]("test", **stage)
    return cls(model=student, args=arguments, train_dataset=some_rows(), stage=stage, teacher_model=teacher_model)


def train(student, teacher_model, folder, data=None, *, per_step: int = 2, kind: str = "train", callback=None, **stage):
    trains_all = stage.get("trains") == "all"
    stage = KINDS[kind]("test", **({"share": 1.0, "lr": 1e-3, "new_lr": 1e-2} | stage))
    align = aligned_parameters(stage, student) if kind == "align" else None
    return train_stage(
        AlignLayers if kind == "align" else TrainEndToEnd,
        student,
        teacher_model,
        stage,
        some_rows() if data is None else data,
        folder,
        trains=align or (lambda name: trains_all or ".mixer." in name),
        batch_tokens=per_step * LENGTH,
        bf16=False,
        seed=0,
        progress=callback or (lambda *_: None),
    )


def weights(student) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def changed(before: dict, student) -> set[str]:
    return {name for name, tensor in student.state_dict().items() if not torch.equal(before[name], tensor)}


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize(
    "stage",
    [
        {"kl": 1.0},
        {"kl": 0.0, "ce": 1.0},
        {"kl": 0.0, "ce": 1.0, "labels": "teacher"},
        {"kl": 0.3, "ce": 0.7, "z_loss": 0.01},
    ],
)
def test_loss_and_gradient_are_those_of_full_logits(teacher, teacher_model, tmp_path, stage, documents):
    student = student_of(teacher)
    trainer = trainer_of(TrainEndToEnd, student, teacher_model, tmp_path, **stage)
    rows = some_rows(3, documents)
    ids, seq_ids = rows.input_ids.long(), rows.seq_ids.long()
    loss = trainer.compute_loss(student, {"input_ids": ids, "seq_ids": seq_ids})
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    # Each document on its own, so that its state starts empty.
    parts = [(row, a) for row in range(3) for a in range(documents)]
    kl, ce, z = [], [], []
    for row, part in parts:
        document = ids[row][seq_ids[row] == part][None]
        ours, theirs = student(document, use_cache=False).logits[0], teacher_model(document, use_cache=False).logits[0]
        p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        cut = 0 if stage.get("labels") == "teacher" else 1
        labels = theirs.argmax(-1) if not cut else document[0, 1:]
        ours = ours[: len(labels)]
        ce.append(F.cross_entropy(ours, labels, reduction="none"))
        z.append(ours.logsumexp(-1) ** 2)
    expected = stage["kl"] * torch.cat(kl).mean()
    expected = expected + stage.get("ce", 0) * (torch.cat(ce).mean() + stage.get("z_loss", 0) * torch.cat(z).mean())
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    expected.backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_labels_stop_at_the_end_of_documents_and_rows():
    ids, seq_ids = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    assert next_tokens(ids, None).tolist() == [[6, 7, 8, -100]]
    assert next_tokens(ids, seq_ids).tolist() == [[6, -100, 8, -100]]


@pytest.mark.parametrize("kind", ["train", "align"])
def test_accumulated_rows_are_one_batch(teacher, teacher_model, tmp_path, kind):
    """One step of 4 rows, one at a time: the optimiser sees the gradient of the mean loss of the four.

    Layers that are aligned have losses and limits of their own.
    """
    student, reference = student_of(teacher), student_of(teacher)
    rows = some_rows(4)
    cls = TrainEndToEnd if kind == "train" else AlignLayers
    trainer = trainer_of(cls, reference, teacher_model, tmp_path, **({} if kind == "align" else LOSSES))
    ids = rows.input_ids.long()
    loss = sum(trainer.loss(reference, row[None], None) for row in ids) / 4
    if kind == "train":  # rows of one document each have equally many labels, so this is the loss of the batch
        torch.testing.assert_close(loss, trainer.loss(reference, ids, None), rtol=1e-6, atol=1e-6)
        loss = trainer.loss(reference, ids, None)
    loss.backward()
    seen = {}

    def keep_gradients(optimizer, *_):
        seen.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})

    handle = register_optimizer_step_pre_hook(keep_gradients)
    try:
        report = train(
            student, teacher_model, tmp_path / "s", rows, per_step=4, kind=kind, **({} if kind == "align" else LOSSES)
        )
    finally:
        handle.remove()
    limited = ["model.layers.0.", "model.layers.1."] if kind == "align" else [""]
    assert report["loss_first"] == pytest.approx(loss.item() / len(limited), abs=2e-4)
    assert len(seen) > 3 and all(name.startswith(tuple(limited)) for name in seen)
    for prefix in limited:
        gradients = {n: p.grad for n, p in reference.named_parameters() if n in seen and n.startswith(prefix)}
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients.values()))
        clip = min(1.0, 1.0 / (float(norm) + 1e-6))
        for name, gradient in gradients.items():
            torch.testing.assert_close(seen[name], gradient * clip, rtol=1e-4, atol=1e-6)


def test_alignment_measures_the_relative_error_of_each_mixer(teacher, teacher_model, tmp_path):
    ids = some_rows(2).input_ids.long()
    same = zoo_teacher(*teacher, torch.float32).requires_grad_(True)
    assert trainer_of(AlignLayers, same, teacher_model, tmp_path).loss(same, ids, None).item() == 0.0
    student = student_of(teacher, keep=[0])
    student.model.layers[0].mixer.requires_grad_(False)
    loss = trainer_of(AlignLayers, student, teacher_model, tmp_path).loss(student, ids, None)
    seen = {}
    hook = teacher_model.model.layers[1].mixer.register_forward_hook(
        lambda _, args, out: seen.update(x=args[0], y=out[0])
    )
    teacher_model(ids, use_cache=False)
    hook.remove()
    said, _ = student.model.layers[1].mixer(seen["x"], None, student.model.make_context(2, LENGTH, ids.device))
    torch.testing.assert_close(loss, (said - seen["y"]).pow(2).sum() / seen["y"].pow(2).sum())


@pytest.mark.parametrize(
    ("mixer", "kind", "trains", "expected"),
    [
        ("hedgehog", "train", "mixers", lambda name: ".mixer." in name),
        ("hedgehog", "train", "all", lambda name: True),
        ("supra", "train", "all", lambda name: True),
        ("mamba2", "train", "mixers", lambda name: ".mixer." in name),
        ("hedgehog", "align", "mixers", lambda name: "layers.1.mixer." in name and ".proj." not in name),
    ],
)
def test_only_what_the_stage_trains_changes(teacher, teacher_model, tmp_path, mixer, kind, trains, expected):
    student = student_of(teacher, mixer, keep=[0])
    before, teacher_before = weights(student), weights(teacher_model)
    report = train(student, teacher_model, tmp_path, kind=kind, **({} if kind == "align" else {"trains": trains}))
    assert report["tokens"] == 8 * LENGTH and report["loss_first"] > 0
    moved = changed(before, student)
    assert moved == {name for name in before if expected(name)}
    assert not changed(teacher_before, teacher_model)


@pytest.mark.parametrize("mixer", ["hedgehog", "supra", "mamba2"])
def test_parameters_from_the_teacher_are_told_from_new_ones(teacher, mixer):
    parts = parts_of(student_of(teacher, mixer))
    new = {name.rsplit("mixer.")[1] for name, part in parts.items() if part == "new"}
    assert (
        new
        == {
            "hedgehog": {"query_map", "key_map", "log_decay", "query_bias", "log_scale"},
            "supra": {"phi.weight", "phi.bias"},
            "mamba2": {"conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight"},
        }[mixer]
    )


def test_training_lowers_the_loss_and_reports_it(teacher, teacher_model, tmp_path):
    ids = some_rows(1).input_ids.expand(24, -1).contiguous()
    data = PackedTokens(ids, torch.zeros_like(ids), "test", TextHashes("test"))
    steps = []
    report = train(student_of(teacher), teacher_model, tmp_path, data, callback=lambda *step: steps.append(step))
    assert report["loss_last"] < 0.8 * report["loss_first"]
    assert report["seconds"] > 0 and report["tokens"] == 24 * LENGTH
    assert steps[0][:2] == (0, 24 * LENGTH) and steps[-1][:2] == (24 * LENGTH, 24 * LENGTH)
    lines = training.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[0]["loss"] == report["loss_first"] and lines[-1]["learning_rate"] < lines[3]["learning_rate"]


class Stop(Exception):
    pass


def stop_at(tokens: int):
    def callback(done, total, info):
        if done >= tokens and info:
            raise Stop

    return callback


@pytest.mark.parametrize("steps", [2, 7])
def test_a_stopped_stage_ends_at_the_same_weights(teacher, teacher_model, tmp_path, steps):
    whole, stopped = student_of(teacher), student_of(teacher)
    expected = train(whole, teacher_model, tmp_path / "whole", some_rows(16))
    with pytest.raises(Stop):
        train(stopped, teacher_model, tmp_path / "stopped", some_rows(16), callback=stop_at(steps * 2 * LENGTH))
    again = student_of(teacher)
    report = train(again, teacher_model, tmp_path / "stopped", some_rows(16))
    assert not changed(weights(whole), again)
    assert (report["loss_first"], report["loss_last"]) == (expected["loss_first"], expected["loss_last"])
    one, two = (training.read_metrics(tmp_path / name) for name in ("whole", "stopped"))
    assert [line["step"] for line in two] == list(range(1, 9))
    assert [line["loss"] for line in one] == [line["loss"] for line in two]
    seconds = [line["seconds"] for line in two]
    assert seconds == sorted(seconds)


def test_a_stage_that_was_done_but_not_recorded_is_not_done_again(teacher, teacher_model, tmp_path):
    first, again = student_of(teacher), student_of(teacher)
    expected = train(first, teacher_model, tmp_path)
    assert train(again, teacher_model, tmp_path) == expected
    assert not changed(weights(first), again)


def test_checkpoints_that_were_cut_off_do_not_count(teacher, teacher_model, tmp_path):
    whole = student_of(teacher)
    train(whole, teacher_model, tmp_path / "whole")
    with pytest.raises(Stop):
        train(student_of(teacher), teacher_model, tmp_path / "cut", callback=stop_at(3 * 2 * LENGTH))
    newest = training.newest_checkpoint(tmp_path / "cut")
    assert newest is not None
    (newest / training.COMPLETE).unlink()
    (newest / "model.safetensors").write_bytes(b"half")
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    again = student_of(teacher)
    train(again, teacher_model, tmp_path / "cut")
    assert not changed(weights(whole), again)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_batch_larger_than_the_text_is_all_of_it(teacher, teacher_model, tmp_path):
    report = train(student_of(teacher), teacher_model, tmp_path, some_rows(3), per_step=50)
    assert report["tokens"] == 3 * LENGTH and report["loss_first"] == report["loss_last"]


def test_bfloat16_training_keeps_float32_weights(teacher, teacher_model, tmp_path):
    student = student_of(teacher)
    stage = Train("test", share=1.0)
    rough = zoo_teacher(*teacher, torch.bfloat16)
    settings = dict(trains=lambda name: ".mixer." in name, batch_tokens=2 * LENGTH, seed=0, progress=lambda *_: None)
    report = train_stage(TrainEndToEnd, student, rough, stage, some_rows(), tmp_path / "b", bf16=True, **settings)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    exact = train_stage(
        TrainEndToEnd, student_of(teacher), teacher_model, stage, some_rows(), tmp_path / "f", bf16=False, **settings
    )
    assert report["loss_first"] == pytest.approx(exact["loss_first"], rel=0.05)
