"""Layers refitted in closed form: equal to a dense solve, on what the student's own layers give, never worse."""

from __future__ import annotations

import math

import pytest
import torch

from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.fit.closed_form import ClosedForm
from rnnzoo.conversions.fit.distances import Distances
from rnnzoo.conversions.fit.observe import observe, token_weights
from rnnzoo.conversions.layers import InMemoryLayers
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.stages.calibrate import fit_layers
from rnnzoo.conversions.student import build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.zoo.core.mixer import Mixer
from rnnzoo.zoo.core.registry import ATTENTION_TYPES, known_mixers, mixer_class

from ..tiny import tiny_teacher

CONVERTIBLE = [
    name
    for name in known_mixers()
    if name not in ATTENTION_TYPES and mixer_class(name).init_from_attention is not Mixer.init_from_attention
]
SOME = ["linear_attention", "gla", "mamba2", "rwkv7"]


def rows_of(ids: torch.Tensor, documents: torch.Tensor | None = None) -> PackedTokens:
    return PackedTokens(ids, torch.zeros_like(ids) if documents is None else documents, "test", TextHashes("test"))


def some_rows(count: int = 2, length: int = 48) -> PackedTokens:
    return rows_of(torch.randint(3, 310, (count, length), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt_neox"])
def teacher(request, tmp_path_factory):
    ref = resolve_teacher(str(tiny_teacher(request.param, tmp_path_factory.mktemp("t"))))
    return ref, ref.load()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    ref = resolve_teacher(str(tiny_teacher("llama", tmp_path_factory.mktemp("t"), num_hidden_layers=3)))
    return ref, ref.load()


def models(teacher, name: str, keep=(), dtype=torch.float64):
    ref, model = teacher
    recipe = Recipe("test", name, [])
    config = student_config(ref, recipe, layer_types(ref, recipe, list(keep)))
    student = build_student(ref, model, config, name, torch.float32, 0).eval().to(dtype)
    return student, zoo_teacher(ref, model, torch.float32).to(dtype)


def fitted(student, teacher_model, data, how, **settings) -> list[dict]:
    """What the layers report of their fit, the student being changed in place."""
    layers = InMemoryLayers(teacher_model, student)
    fit_layers(layers, data, how, **settings)
    return layers.reports()


@torch.no_grad()
def seen_by(model, ids):
    """Of each layer: the stream before it, what its last linear layer is given and the mixer's output, (T, ...)."""
    found, hooks = [], []
    for block in model.model.layers:
        found.append({})

        def keep(key, into=found[-1]):
            def hook(_, args, out):
                into[key] = out[0][0] if key == "output" else args[0][0]

            return hook

        hooks.append(block.register_forward_hook(keep("stream")))
        hooks.append(block.mixer.output_projection().register_forward_hook(keep("given")))
        hooks.append(block.mixer.register_forward_hook(keep("output")))
    model.model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def rows(models_seen, layer: int, key: str) -> torch.Tensor:
    return torch.cat([seen[layer][key] for seen in models_seen])


def dense(y, wanted, old, ridge, weights=None):
    """The ridge solution around `old`, by least squares on all rows at once."""
    root = torch.ones(len(y), 1, dtype=y.dtype) if weights is None else weights.sqrt()[:, None]
    level = (ridge * (root * y).square().sum(0).mean()).sqrt()
    a = torch.cat([root * y, level * torch.eye(y.shape[1], dtype=y.dtype)])
    return torch.linalg.lstsq(a, torch.cat([root * wanted, level * old.T])).solution.T


@pytest.mark.parametrize("weighting", ["none", "norm"])
@pytest.mark.parametrize("name", SOME)
def test_every_layer_is_the_dense_solution_on_the_students_own_inputs(teacher, name, weighting):
    """Inputs and streams are those of the finished student: a layer has seen the refit of those before it."""
    student, teacher_model = models(teacher, name)
    old = [block.mixer.output_projection().weight.clone() for block in student.model.layers]
    old_bias = [block.mixer.output_projection().bias for block in student.model.layers]
    old_bias = [None if bias is None else bias.detach().clone() for bias in old_bias]
    data = some_rows()
    fitted(student, teacher_model, data, ClosedForm(("output",), 0.05, 0.5, weighting))
    ours, theirs = (
        [seen_by(model, data[i]["input_ids"]) for i in range(len(data))] for model in (student, teacher_model)
    )
    for layer, block in enumerate(student.model.layers):
        y = rows(ours, layer, "given")
        stream = rows(theirs, layer, "stream")
        wanted = rows(theirs, layer, "output") + 0.5 * (stream - rows(ours, layer, "stream"))
        weights = None
        if weighting == "norm":
            right = stream + rows(theirs, layer, "output")
            # What the layer said before its refit, of the inputs that it has now.
            linear_before = y @ old[layer].T + (0 if old_bias[layer] is None else old_bias[layer])
            off = (rows(ours, layer, "stream") + linear_before - right).square().mean(-1).view(2, -1)
            size = right.square().mean(-1).view(2, -1)
            weights = 1 / ((off / size).median(1, keepdim=True).values * size + off).flatten()
        before, bias = old[layer], old_bias[layer]
        if bias is not None:
            y, before = torch.nn.functional.pad(y, (0, 1), value=1.0), torch.cat([before, bias[:, None]], 1)
        expected = dense(y, wanted, before, 0.05, weights)
        linear = block.mixer.output_projection()
        torch.testing.assert_close(linear.weight, expected[:, : y.shape[1] - (bias is not None)], rtol=1e-4, atol=1e-5)
        if bias is not None:
            torch.testing.assert_close(linear.bias, expected[:, -1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(linear.weight, old[layer], atol=1e-3)


@pytest.mark.parametrize("name", ["linear_attention", "gla"])
def test_the_scale_of_a_head_is_its_own_least_squares(llama, name):
    student, teacher_model = models(llama, name)
    old = [block.mixer.proj.o_proj.weight.clone() for block in student.model.layers]
    data = some_rows()
    fitted(student, teacher_model, data, ClosedForm(("scale",), correct=0.0, weighting="none"))
    ours, theirs = (
        [seen_by(model, data[i]["input_ids"]) for i in range(len(data))] for model in (student, teacher_model)
    )
    taken = 0
    for layer, block in enumerate(student.model.layers):
        said, taught = rows(ours, layer, "given"), rows(theirs, layer, "given")
        scale = torch.stack(
            [(t * s).sum() / (s * s).sum() for s, t in zip(said.split(8, 1), taught.split(8, 1), strict=True)]
        )
        scaled, wanted = old[layer] * scale.repeat_interleave(8), rows(theirs, layer, "output")
        better = (said @ scaled.T - wanted).square().sum() < (said @ old[layer].T - wanted).square().sum()
        torch.testing.assert_close(block.mixer.proj.o_proj.weight, scaled if better else old[layer])
        taken += bool(better)
    assert taken


def test_decays_come_from_how_far_the_teachers_heads_look(llama):
    """ln 2 over the mean distance, by the dense matrix of weights; the first four tokens do not count."""
    student, teacher_model = models(llama, "gated_delta_net")
    ids = some_rows(1)[0]["input_ids"]
    fitted(student, teacher_model, rows_of(ids[None]), ClosedForm(("decay",)))
    for layer, block in zip(observe(teacher_model, ids, False, 0), student.model.layers, strict=True):
        k = layer.turned_k.repeat_interleave(3, 1)
        scores = torch.einsum("thd,shd->hts", layer.turned_q, k) * 8**-0.5
        time = torch.arange(len(ids))
        distance = time[:, None] - time[None]
        share = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) * (time >= 4)
        mean = ((share * distance).sum((1, 2)) / share.sum((1, 2))).clamp(min=1)
        rate = (math.log(2) / mean).view(2, 3).log().mean(1).exp().double()
        mixer = block.mixer
        torch.testing.assert_close(
            mixer.A_log.exp() * torch.nn.functional.softplus(mixer.dt_bias), rate, rtol=1e-4, atol=1e-6
        )


def test_distances_stay_within_a_document(llama):
    _, teacher_model = models(llama, "gla", dtype=torch.float32)
    ids = some_rows(1, 60)[0]["input_ids"]
    mixer, hidden = teacher_model.model.layers[0].mixer, teacher_model.model.embed_tokens(ids)[None]
    apart, packed = Distances(mixer), Distances(mixer)
    for part in hidden.split(20, 1):
        apart.add(part, teacher_model.model.make_context(1, 20, ids.device))
    documents = torch.arange(60)[None] // 20
    packed.add(hidden, teacher_model.model.make_context(1, 60, ids.device, seq_ids=documents))
    torch.testing.assert_close(apart.mean(), packed.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_no_student_gets_worse_on_the_calibration_text(llama, name):
    """The error of a layer's refit, which `fit_layers` reports, and the distance of the last hidden states."""
    student, teacher_model = models(llama, name, dtype=torch.float32)
    data, parts = some_rows(), ("decay", "scale", "output")
    found = fitted(student, teacher_model, data, ClosedForm(parts))
    assert [layer["layer"] for layer in found] == [0, 1, 2]
    for layer in found:
        assert layer["after"] <= layer["before"] + 1e-9 and layer["after"] < 1.5
    assert all(bool(p.isfinite().all()) for p in student.parameters())
    again, _ = models(llama, name, dtype=torch.float32)
    fitted(again, teacher_model, data, ClosedForm(parts))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_the_refitted_student_is_nearer_to_the_teacher(llama, name):
    student, teacher_model = models(llama, name)
    data = some_rows(4, 64)
    ids = data.input_ids.long()

    def divergence() -> float:
        p, q = (model(ids, use_cache=False).logits.log_softmax(-1) for model in (teacher_model, student))
        return float((p.exp() * (p - q)).sum(-1).mean())

    before = divergence()
    fitted(student, teacher_model, data, ClosedForm(("decay", "scale", "output"), 0.03))
    assert divergence() < 0.9 * before


def test_only_the_layers_asked_for_change_and_kept_ones_are_passed_over(llama):
    student, teacher_model = models(llama, "gla", keep=[0])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = fitted(student, teacher_model, some_rows(), ClosedForm(), only=[0, 2])
    assert [layer["layer"] for layer in found] == [2]
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.layers.2.mixer.proj.o_proj.weight", "model.layers.2.mixer.forget_up.bias"}


def test_token_weights_are_the_mean_squared_gradients_of_the_layers(llama):
    _, teacher_model = models(llama, "gla", dtype=torch.float32)
    ids = some_rows(1)[0]["input_ids"]
    expected = torch.stack([layer.gradient.square().mean(-1) for layer in observe(teacher_model, ids, True, 7)])
    torch.testing.assert_close(token_weights(teacher_model, ids, None, 7), expected)
    documents = (torch.arange(len(ids)) >= 30).long()
    apart = token_weights(teacher_model, ids, documents, 7)
    assert apart.shape == expected.shape and not torch.allclose(apart, expected)


def test_weights_of_tokens_enter_the_fit(llama):
    """Tokens of weight zero might as well not be there; here they are the second row."""
    data, how = some_rows(2), ClosedForm(("output",), 0.03, weighting="gradient", correct=0.0)
    (one, teacher_model), (two, _) = models(llama, "gla"), models(llama, "gla")
    weights = torch.ones(3, 2, 48)
    weights[:, 1] = 0
    fitted(one, teacher_model, data, how, weights=weights)
    fitted(two, teacher_model, data.rows(0, 1), how)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
