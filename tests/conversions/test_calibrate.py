"""Calibration: what is observed is what a direct computation gives, and fitted features are better than none."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.fit.closed_form import ClosedForm
from rnnzoo.conversions.fit.observe import observe
from rnnzoo.conversions.layers import InMemoryLayers
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.stages.calibrate import fit_layers
from rnnzoo.conversions.student import build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher

from .tiny import tiny_teacher


def rows_of(ids: torch.Tensor) -> PackedTokens:
    return PackedTokens(ids, torch.zeros_like(ids), "test", TextHashes("test"))


def some_rows(count: int = 2, length: int = 64) -> PackedTokens:
    return rows_of(torch.randint(3, 310, (count, length), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt_neox"])
def teacher(request, tmp_path_factory):
    ref = resolve_teacher(str(tiny_teacher(request.param, tmp_path_factory.mktemp("t"))))
    return ref, ref.load()


def student_of(teacher, keep=(), **options):
    ref, model = teacher
    recipe = Recipe("test", "hedgehog", [], student_options={"feature_map": "prototype", "feature_width": 4} | options)
    config = student_config(ref, recipe, layer_types(ref, recipe, list(keep)))
    return build_student(ref, model, config, "hedgehog", torch.float32, 0).eval()


def test_the_gradient_is_that_of_the_loss_on_drawn_labels(teacher):
    """By finite differences in the output of a layer, with the labels that the same seed draws."""
    teacher_model = zoo_teacher(*teacher, torch.float32).double()
    ids = some_rows(1, 24)[0]["input_ids"]
    observed = observe(teacher_model, ids, True, 3)[0]
    with torch.no_grad():
        hidden = teacher_model.model(ids[None], use_cache=False).last_hidden_state[0]
        p = (hidden @ teacher_model.lm_head.weight.T).float().softmax(-1)
        level = torch.rand(len(ids), 1, generator=torch.Generator().manual_seed(3))
        labels = torch.searchsorted(p.cumsum(-1), level)[:, 0].clamp(max=p.shape[-1] - 1)
    direction = torch.randn(24, 48, dtype=torch.float64)

    def loss(step: float) -> float:
        block = teacher_model.model.layers[0].mixer.proj.o_proj
        hook = block.register_forward_hook(lambda _, args, out: out + step * direction)
        with torch.no_grad():
            logits = teacher_model(ids[None], use_cache=False).logits[0]
        hook.remove()
        return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    torch.testing.assert_close(float((observed.gradient * direction).sum()), slope, rtol=1e-2, atol=1e-2)


def error_of(student, teacher_model, ids) -> list[float]:
    """Relative squared error of each hedgehog layer's output on the teacher's own inputs."""
    seen = []
    hooks = [
        b.mixer.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
        for b in teacher_model.model.layers
    ]
    with torch.no_grad():
        teacher_model(ids[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        ctx = student.model.make_context(1, len(ids), ids.device)
        said = [b.mixer(x, None, ctx)[0] for b, (x, _) in zip(student.model.layers, seen, strict=True)]
    return [float((a - b).pow(2).sum() / b.pow(2).sum()) for a, (_, b) in zip(said, seen, strict=True)]


def test_fitted_features_are_better_than_none(teacher):
    """On text with structure (few words, again and again), unseen rows too."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 310, (12, 4), generator=generator)
    ids = words[torch.randint(0, 12, (2, 48), generator=generator)].flatten(1)
    teacher_model = zoo_teacher(*teacher, torch.float32)
    options = {"window_size": 4, "num_sinks": 1}
    fitted, without = student_of(teacher, **options), student_of(teacher, **options, feature_width=0)
    fit_layers(InMemoryLayers(teacher_model, fitted), rows_of(ids), ClosedForm(()), features=0)
    for row in ids:
        for ours, none in zip(error_of(fitted, teacher_model, row), error_of(without, teacher_model, row), strict=True):
            assert ours < 0.9 * none
    assert all(bool((block.mixer.log_decay < 0).all()) for block in fitted.model.layers)
    assert all(bool(p.isfinite().all()) for p in fitted.parameters())


def test_only_the_layers_asked_for_are_fitted(teacher):
    teacher_model, data = zoo_teacher(*teacher, torch.float32), some_rows(1)
    before, after = student_of(teacher, window_size=4), student_of(teacher, window_size=4)
    fit_layers(InMemoryLayers(teacher_model, after), data, ClosedForm(()), features=0, only=[1])
    one, two = (layers[0].mixer.state_dict() for layers in (before.model.layers, after.model.layers))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(before.model.layers[1].mixer.key_map, after.model.layers[1].mixer.key_map)


@pytest.mark.parametrize("options", [{"feature_width": 0}, {"feature_map": "softmax"}, {"window_size": 200}])
def test_layers_with_nothing_to_fit_stay_as_they_are(teacher, options):
    student = student_of(teacher, **options)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    layers = InMemoryLayers(zoo_teacher(*teacher, torch.float32), student)
    fit_layers(layers, some_rows(1), ClosedForm(()), features=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_kept_layers_are_passed_over(teacher):
    student = student_of(teacher, keep=[0], window_size=4)
    layers = InMemoryLayers(zoo_teacher(*teacher, torch.float32), student)
    fit_layers(layers, some_rows(1), ClosedForm(()), features=0)
    assert student.config.layer_types == ["full_attention", "hedgehog"]
