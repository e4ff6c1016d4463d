"""Window dropout: rows lose as much of their windows as the seed says, in training only, whatever the interruptions."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.recipes.prepare import prepare_recipe
from rnnzoo.conversions.stages.window_dropout import kept_share, reduced_windows
from rnnzoo.conversions.student import zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError

from ..test_training import LENGTH, Stop, changed, some_rows, stop_at, student_of, train, trainer_of, weights
from ..test_training import TrainEndToEnd as EndToEnd
from ..tiny import tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    ref = resolve_teacher(str(tiny_teacher("llama", tmp_path_factory.mktemp("t"))))
    return ref, ref.load()


@pytest.fixture(scope="module")
def teacher_model(teacher):
    return zoo_teacher(*teacher, torch.float32)


def test_as_many_rows_are_reduced_as_asked_for_half_of_them_to_nothing():
    rows = torch.arange(4000).view(-1, 1)
    shares = [kept_share(0.5, 0, 3, row) for row in rows]
    reduced = [share for share in shares if share < 1]
    assert 0.46 < len(reduced) / len(shares) < 0.54
    assert 0.46 < sum(share == 0 for share in reduced) / len(reduced) < 0.54
    parts = [share for share in reduced if share]
    assert 0.45 < sum(parts) / len(parts) < 0.55
    assert {kept_share(0.0, 0, 3, row) for row in rows[:50]} == {1.0}
    assert 1.0 not in {kept_share(1.0, 0, 3, row) for row in rows[:50]}


def test_the_choice_is_of_seed_step_and_row_alone():
    row = torch.arange(30)[None]
    torch.manual_seed(1)
    first = [kept_share(0.5, 7, step, row) for step in range(40)]
    torch.manual_seed(2)
    assert [kept_share(0.5, 7, step, row.to(torch.int32)) for step in range(40)] == first
    assert [kept_share(0.5, 8, step, row) for step in range(40)] != first
    assert len(set(first)) > 5


@torch.no_grad()
def test_reduced_windows_are_shorter_or_only_the_linear_branch_and_whole_again_afterwards(teacher):
    student, ids = student_of(teacher, keep=[0]).eval(), some_rows(1).input_ids.long()
    mixer, whole = student.model.layers[1].mixer, student(ids, use_cache=False).logits
    lengths = mixer.lengths
    with reduced_windows(student, 0.5):
        assert mixer.lengths == tuple(length // 2 for length in lengths)
        assert not torch.equal(student(ids, use_cache=False).logits, whole)
    with reduced_windows(student, 0.01):
        assert set(mixer.lengths) == {1}
    with reduced_windows(student, 0.0):
        dropped = student(ids, use_cache=False).logits
    with mixer.only("linear"):
        assert torch.equal(student(ids, use_cache=False).logits, dropped)
    assert mixer.lengths == lengths and torch.equal(student(ids, use_cache=False).logits, whole)


def test_a_step_learns_from_the_reduced_window(teacher, teacher_model, tmp_path):
    student, ids = student_of(teacher), some_rows(1).input_ids.long()
    trainer = trainer_of(EndToEnd, student, teacher_model, tmp_path, window_dropout=1.0)
    inputs = {"input_ids": ids, "seq_ids": torch.zeros_like(ids)}
    with trainer.loss_as_forward():
        found = trainer.compute_loss(student, inputs)
        found.backward()
    share = kept_share(1.0, trainer.args.seed, 0, ids)
    with reduced_windows(student, share):
        torch.testing.assert_close(found, trainer.loss(student, ids, None))
    assert not torch.isclose(found, trainer.loss(student, ids, None))
    assert student.model.layers[0].mixer.lengths == (4, 4)


@pytest.mark.parametrize("kind", ["train", "align"])
def test_a_stopped_stage_drops_the_same_windows(teacher, teacher_model, tmp_path, kind):
    whole, stopped, again, plain = (student_of(teacher) for _ in range(4))
    settings = {"kind": kind, "window_dropout": 0.5}
    train(whole, teacher_model, tmp_path / "whole", some_rows(12), **settings)
    with pytest.raises(Stop):
        train(stopped, teacher_model, tmp_path / "stopped", some_rows(12), callback=stop_at(6 * LENGTH), **settings)
    train(again, teacher_model, tmp_path / "stopped", some_rows(12), **settings)
    assert not changed(weights(whole), again)
    train(plain, teacher_model, tmp_path / "plain", some_rows(12), kind=kind)
    assert changed(weights(whole), plain)


def test_a_student_without_windows_is_refused(teacher, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("student: supra\nstages: [{name: up, kind: train, share: 1.0, window_dropout: 0.5}]")
    with pytest.raises(RnnzooError, match="stage up: window_dropout needs layers with an exact window"):
        prepare_recipe(str(recipe), teacher[0])
