"""Longer rows: one chunk is the train stage, the state is passed on exactly, gradients stop where they should."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.stages.extend import Extend, ExtendContext
from rnnzoo.conversions.stages.train import Train, TrainEndToEnd
from rnnzoo.conversions.stages.training import TrainingArguments, next_tokens
from rnnzoo.conversions.student import zoo_teacher
from rnnzoo.zoo.core.cache import RecurrentCache

from .jobs import OneStage, Stop, changed, random_rows, resolved, stop_at, student_of, weights

LOSSES = {"kl": 0.7, "reverse_kl": 0.2, "ce": 0.4, "z_loss": 0.01}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """One whose positions end at 40."""
    return resolved(tmp_path_factory.mktemp("t"), max_position_embeddings=40)


@pytest.fixture(scope="module")
def teacher_model(teacher):
    return zoo_teacher(*teacher, torch.float32)


def stage_of(**settings) -> Extend:
    return Extend("longer", **({"share": 1.0, "length": 64, "chunk": 16, "lr": 1e-3} | settings))


def trainer_of(cls, student, teacher_model, folder, stage):
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    trainer = cls(model=student, args=arguments, train_dataset=random_rows(2), stage=stage, teacher_model=teacher_model)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step(trainer, student, rows) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a training step on all rows at once, and its gradients."""
    student.zero_grad()
    inputs = {"input_ids": rows.input_ids.long(), "seq_ids": rows.seq_ids.long()}
    loss = trainer.training_step(student, inputs)
    return loss, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("labels", ["text", "teacher"])
@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("mixer", ["hedgehog", "mamba2"])
def test_a_row_of_one_chunk_is_a_row_of_the_train_stage(teacher, teacher_model, tmp_path, mixer, documents, labels):
    student, rows = student_of(teacher, mixer, keep=[0]), random_rows(2, 40, documents)
    losses = LOSSES | {"labels": labels}
    longer = trainer_of(ExtendContext, student, teacher_model, tmp_path, stage_of(length=40, chunk=40, **losses))
    whole = trainer_of(TrainEndToEnd, student, teacher_model, tmp_path, Train("t", **losses))
    assert_same(step(longer, student, rows), step(whole, student, rows))


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("mixer", ["hedgehog", "gla", "mamba2", "rwkv7"])
def test_the_gradient_through_all_chunks_is_that_of_the_row(teacher, teacher_model, tmp_path, mixer, documents):
    """Chunks of 16 and a rest of 8, in one group: nothing is cut."""
    student, rows = student_of(teacher, mixer, keep=[0]), random_rows(2, 40, documents)
    longer = trainer_of(ExtendContext, student, teacher_model, tmp_path, stage_of(length=40, grad_chunks=3, **LOSSES))
    whole = trainer_of(TrainEndToEnd, student, teacher_model, tmp_path, Train("t", **LOSSES))
    assert_same(step(longer, student, rows), step(whole, student, rows), 1e-3)


@pytest.mark.parametrize("mixer", ["hedgehog", "mamba2"])
def test_the_state_at_the_end_is_that_of_the_whole_row_and_the_gradient_is_cut(teacher, teacher_model, tmp_path, mixer):
    student, rows = student_of(teacher, mixer), random_rows(1, 64)
    trainer = trainer_of(ExtendContext, student, teacher_model, tmp_path, stage_of(**LOSSES))
    loss, gradients = step(trainer, student, rows)
    cache = RecurrentCache(student.config)
    with torch.no_grad():
        student.model(rows.input_ids.long(), cache=cache)
    assert trainer.caches[0].length == cache.length == 64
    for found, expected in zip(trainer.caches[0].states, cache.states, strict=True):
        for one, two in zip(found.tensors(), expected.tensors(), strict=True):
            assert not one.requires_grad
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    through = trainer_of(ExtendContext, student, teacher_model, tmp_path, stage_of(grad_chunks=4, **LOSSES))
    whole_loss, whole = step(through, student, rows)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(gradients[name], whole[name], rtol=1e-2, atol=1e-4) for name in whole)


@pytest.mark.parametrize("lengths", [(64,), (10, 54), (50, 14)])
def test_beyond_the_teachers_positions_the_loss_is_of_the_text(teacher, teacher_model, tmp_path, lengths):
    """KL at positions below 40 of each document, cross-entropy at the others; the teacher sees each document alone."""
    student = student_of(teacher)
    ids = random_rows(1, 64).input_ids
    seq_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    rows = PackedTokens(ids, seq_ids, "test", TextHashes("test"))
    stage = stage_of(kl=0.5, ce=0.3, beyond=2.0)
    loss, _ = step(trainer_of(ExtendContext, student, teacher_model, tmp_path, stage), student, rows)
    labels = next_tokens(ids.long(), rows.seq_ids.long())[0]
    expected, first = 0.0, 0
    with torch.no_grad():
        for length in lengths:
            document, said = ids[:, first : first + length].long(), labels[first : first + length]
            q = student(document).logits[0].log_softmax(-1)
            p = teacher_model(document[:, :40]).logits[0].log_softmax(-1)
            entropy = torch.nn.functional.nll_loss(q, said, reduction="none", ignore_index=-100)
            expected += 0.5 * (p.exp() * (p - q[:40])).sum() / 64
            expected += (0.3 * entropy[:40].sum() + 2.0 * entropy[40:].sum()) / (labels != -100).sum()
            first += length
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trains", ["mixers", "lora"])
def test_a_stopped_stage_ends_at_the_same_weights(teacher, tmp_path, trains):
    stage, rows = stage_of(trains=trains, ce=0.5), random_rows(8, 64, 2)
    whole, again = student_of(teacher), student_of(teacher)
    expected = OneStage(teacher, tmp_path / "whole", rows=rows).do(stage, whole)
    with pytest.raises(Stop):
        OneStage(teacher, tmp_path / "cut", rows=rows, callback=stop_at(2 * 2 * 64)).do(stage, student_of(teacher))
    report = OneStage(teacher, tmp_path / "cut", rows=rows).do(stage, again)
    assert not changed(weights(whole), again)
    assert (report["loss_first"], report["loss_last"]) == (expected["loss_first"], expected["loss_last"])


def test_without_a_teacher_it_is_cross_entropy(teacher, tmp_path):
    student, rows = student_of(teacher), random_rows(2, 64)
    stage = stage_of(kl=0.0, ce=1.0)
    loss, _ = step(trainer_of(ExtendContext, student, None, tmp_path, stage), student, rows)
    ids = rows.input_ids.long()
    with torch.no_grad():
        logits = student(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
