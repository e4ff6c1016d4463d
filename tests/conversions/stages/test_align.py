"""Align stages: each loss is its formula, each layer learns alone, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.stages import training
from rnnzoo.conversions.stages.align import Align, AlignLayers, aligned_parameters
from rnnzoo.conversions.stages.layer_targets import mixer_inputs
from rnnzoo.conversions.stages.training import read_metrics, train_stage
from rnnzoo.conversions.student import build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher

from ..test_training import Stop, changed, some_rows, stop_at, weights
from ..tiny import tiny_teacher

LENGTH = 32


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    ref = resolve_teacher(str(tiny_teacher("llama", tmp_path_factory.mktemp("t"), num_hidden_layers=3)))
    return ref, ref.load()


@pytest.fixture(scope="module")
def teacher_model(teacher):
    return zoo_teacher(*teacher, torch.float32)


def student_of(teacher, mixer: str = "phi_mamba", keep=(), **options):
    ref, model = teacher
    recipe = Recipe("test", mixer, [], student_options=options)
    config = student_config(ref, recipe, layer_types(ref, recipe, list(keep)))
    return build_student(ref, model, config, mixer, torch.float32, 0)


def trainer_of(student, teacher_model, folder, **settings):
    arguments = training.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    stage = Align("test", **settings)
    trains = aligned_parameters(stage, student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trains(name))
    return AlignLayers(
        model=student, args=arguments, train_dataset=some_rows(), stage=stage, teacher_model=teacher_model
    )


def train(student, teacher_model, folder, rows=12, per_step=2, callback=None, **settings):
    stage = Align("test", share=1.0, **({"lr": 1e-3, "new_lr": 1e-3} | settings))
    return train_stage(
        AlignLayers,
        student,
        teacher_model,
        stage,
        some_rows(rows),
        folder,
        trains=aligned_parameters(stage, student),
        batch_tokens=per_step * LENGTH,
        bf16=False,
        seed=0,
        progress=callback or (lambda *_: None),
    )


def attention_by_hand(teacher_model, ids):
    """Of every layer of the teacher: its mixer's input, softmax matrix (B, H, T, T), heads (B, T, H * d), output."""
    hidden = teacher_model.model.embed_tokens(ids)
    ctx = teacher_model.model.make_context(*ids.shape, ids.device)
    above = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for block in teacher_model.model.layers:
        given = block.input_layernorm(hidden)
        q, k, v = block.mixer.proj.split(given)
        q, k = (ctx.rotary.rotate(x, ctx.positions) for x in (q, k))
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
        scores = (q.transpose(1, 2) @ k.mT) * q.shape[-1] ** -0.5
        matrix = scores.masked_fill(above, -torch.inf).softmax(-1)
        heads = (matrix @ v).transpose(1, 2).flatten(-2)
        output = block.mixer.proj.o_proj(heads)
        yield given, matrix, heads, output
        hidden, _, _ = block(hidden, None, ctx)


def by_hand(student, teacher_model, ids, target, loss, inputs="teacher"):
    """The formulas written out, on layers 0 and 1 (2 is kept)."""
    ctx = student.model.make_context(*ids.shape, ids.device)
    own = student.model.embed_tokens(ids)
    losses = []
    for block, (given, *wanted) in zip(student.model.layers, attention_by_hand(teacher_model, ids), strict=True):
        mixer = block.mixer
        given = block.input_layernorm(own) if inputs == "student" else given
        own = block(own, None, ctx)[0].detach()
        if not any(p.requires_grad for p in mixer.parameters()):
            continue
        matrix, heads, output = wanted
        seen = []
        hook = mixer.output_projection().register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        said = mixer(given, None, ctx)[0]
        hook.remove()
        if target == "matrices":
            difference, aim = mixer.mixing_matrix(given, ctx) - matrix, matrix
            norm = difference.square().sum((-1, -2)).sqrt().mean()
        else:
            said, aim = (said, output) if target == "outputs" else (seen[0], heads)
            difference = said - aim
            norm = (difference.square().sum(-1).sqrt() / difference.shape[-1] ** 0.5).mean()
        squares = difference.square()
        losses.append({"norm": norm, "mse": squares.mean(), "relative": squares.sum() / aim.square().sum()}[loss])
    assert len(losses) == 2
    return sum(losses)


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize("loss", ["relative", "mse", "norm"])
@pytest.mark.parametrize("target", ["matrices", "heads", "outputs"])
def test_the_loss_is_the_formula_and_so_is_its_gradient(teacher, teacher_model, tmp_path, target, loss, inputs):
    student, ids = student_of(teacher, keep=[2]), some_rows(2).input_ids.long()
    trainer = trainer_of(
        student, teacher_model, tmp_path, target=target, loss=loss, inputs=inputs, trains="mixers", weight=3.0
    )
    found = trainer.loss(student, ids, None)
    found.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected = 3 * by_hand(student, teacher_model, ids, target, loss, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    expected.backward()
    reference = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys() and len(gradients) > 6
    for name, gradient in reference.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("target", ["matrices", "heads", "outputs"])
def test_documents_of_a_row_are_aligned_by_themselves(teacher, teacher_model, tmp_path, target):
    student, rows = student_of(teacher), some_rows(1, documents=2)
    trainer = trainer_of(student, teacher_model, tmp_path, target=target, loss="mse", trains="mixers")
    ids, seq_ids = rows.input_ids.long(), rows.seq_ids.long()
    whole = trainer.loss(student, ids, seq_ids)
    parts = [trainer.loss(student, part, None) for part in ids.split(LENGTH // 2, 1)]
    # Of a matrix, the quarters that join two documents are zeros on both sides.
    factor = 0.25 if target == "matrices" else 0.5
    torch.testing.assert_close(whole, factor * (parts[0] + parts[1]), rtol=1e-4, atol=1e-6)


def test_a_copy_of_the_teacher_has_nothing_to_learn(teacher, teacher_model, tmp_path):
    same = zoo_teacher(*teacher, torch.float32)
    ids = some_rows(2).input_ids.long()
    for target in ("matrices", "heads", "outputs"):
        trainer = trainer_of(same, teacher_model, tmp_path, target=target, inputs="student")
        same.requires_grad_(True)
        assert trainer.loss(same, ids, None).item() < 1e-12


def test_no_gradient_goes_from_a_layer_into_the_one_before(teacher, teacher_model, tmp_path):
    student, ids = student_of(teacher), some_rows(2).input_ids.long()
    trainer = trainer_of(student, teacher_model, tmp_path, inputs="student", trains="mixers", loss="mse")
    trainer.loss(student, ids, None).backward()
    whole = student.model.layers[0].mixer.proj.v_proj.weight.grad.clone()
    student.zero_grad()
    for block in student.model.layers[1:]:
        block.mixer.requires_grad_(False)
    trainer.loss(student, ids, None).backward()
    torch.testing.assert_close(student.model.layers[0].mixer.proj.v_proj.weight.grad, whole)


def test_the_students_inputs_are_what_its_forward_pass_gives_each_mixer(teacher):
    student, ids = student_of(teacher), some_rows(1).input_ids.long()
    seen = {}
    for i, block in enumerate(student.model.layers):
        block.mixer.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0]))
    student(ids, use_cache=False)
    found = mixer_inputs(student, ids, None, [0, 1, 2])
    assert found.keys() == seen.keys() == {0, 1, 2}
    for i in seen:
        assert torch.equal(found[i], seen[i]) and not found[i].requires_grad


@pytest.mark.parametrize(
    ("mixer", "trains", "parts"),
    [
        ("hedgehog", "new", {"query_map", "key_map", "log_factor", "log_decay"}),
        ("hedgehog", "features", {"query_map", "key_map", "log_factor"}),
        ("supra", "mixers", {"proj.q_proj", "proj.k_proj", "proj.v_proj", "proj.o_proj", "phi"}),
    ],
)
def test_only_what_the_stage_trains_moves(teacher, teacher_model, tmp_path, mixer, trains, parts):
    options = {"window_size": 4, "num_sinks": 0} if mixer == "hedgehog" else {}
    student = student_of(teacher, mixer, keep=[1], **options)
    before = weights(student)
    train(student, teacher_model, tmp_path, trains=trains)
    moved = {name.removesuffix(".weight").removesuffix(".bias") for name in changed(before, student)}
    assert moved == {f"model.layers.{i}.mixer.{part}" for i in (0, 2) for part in parts}


def test_one_after_the_other_each_layer_has_an_equal_part_of_the_steps(teacher, teacher_model, tmp_path):
    """7 steps for 3 layers: 3, 2 and 2; a layer moves in its own steps alone, and begins with a whole schedule."""
    student, moved = student_of(teacher), []
    before = weights(student)

    def look(done, total, info):
        nonlocal before
        if info:
            moved.append({int(name.split(".")[2]) for name in changed(before, student)})
            before = weights(student)

    settings = {"order": "sequential", "trains": "mixers", "inputs": "student", "warmup": 0.0}
    train(student, teacher_model, tmp_path, rows=14, callback=look, **settings)
    assert moved == [{0}] * 3 + [{1}] * 2 + [{2}] * 2
    rates = [line["learning_rate"] for line in read_metrics(tmp_path)]
    cosine = [1e-3, 0.75e-3, 0.25e-3, 1e-3, 0.5e-3, 1e-3, 0.5e-3]
    assert rates == pytest.approx(cosine)


def test_with_fewer_steps_than_layers_several_learn_in_a_step(teacher, teacher_model, tmp_path):
    student = student_of(teacher)
    before = weights(student)
    train(student, teacher_model, tmp_path, rows=4, order="sequential", trains="mixers", warmup=0.0)
    assert {int(name.split(".")[2]) for name in changed(before, student)} == {0, 1, 2}


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_killed_in_any_layer_it_ends_at_the_same_weights(teacher, teacher_model, tmp_path, steps):
    settings = {"order": "sequential", "inputs": "student", "trains": "mixers", "loss": "norm", "rows": 18}
    whole, stopped, again = (student_of(teacher) for _ in range(3))
    expected = train(whole, teacher_model, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        train(stopped, teacher_model, tmp_path / "stopped", callback=stop_at(steps * 2 * LENGTH), **settings)
    report = train(again, teacher_model, tmp_path / "stopped", **settings)
    assert not changed(weights(whole), again)
    assert (report["loss_first"], report["loss_last"]) == (expected["loss_first"], expected["loss_last"])
