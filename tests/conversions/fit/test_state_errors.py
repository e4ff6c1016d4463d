"""Measured errors are those of a direct computation with the layers themselves."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.fit import state_errors
from rnnzoo.conversions.fit.closed_form import ClosedForm
from rnnzoo.conversions.fit.observe import observe
from rnnzoo.conversions.fit.state_errors import measure_states
from rnnzoo.conversions.layers import InMemoryLayers
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.stages.calibrate import fit_layers
from rnnzoo.conversions.student import build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.zoo.core.registry import mixer_class

from ..tiny import tiny_teacher


def some_rows(count: int = 2, length: int = 64) -> PackedTokens:
    ids = torch.randint(3, 310, (count, length), generator=torch.Generator().manual_seed(0))
    return PackedTokens(ids, torch.zeros_like(ids), "test", TextHashes("test"))


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt_neox"])
def teacher(request, tmp_path_factory):
    ref = resolve_teacher(str(tiny_teacher(request.param, tmp_path_factory.mktemp("t"))))
    return ref, ref.load()


@pytest.mark.parametrize("sinks", [0, 3])
def test_measured_errors_are_those_of_a_dense_mask(teacher, sinks):
    """|| W_o (attention cut to window and sinks - attention) ||^2, head by head, times the mean of the gradient^2."""
    teacher_model, data = zoo_teacher(*teacher, torch.float32), some_rows()
    measured = measure_states(teacher_model, data, sinks, seed=5)
    assert measured.windows == (1, 2, 4, 8, 16, 32) and measured.widths == (0,)
    time = data.seq_len
    distance = torch.arange(time)[:, None] - torch.arange(time)[None]
    total = torch.zeros_like(measured.errors)
    for number in range(len(data)):
        observed = observe(teacher_model, data[number]["input_ids"], True, 5 + number)
        for i, layer in enumerate(observed):
            groups = layer.q.shape[1] // layer.k.shape[1]
            keys, values = (x.repeat_interleave(groups, 1) for x in (layer.turned_k, layer.v))
            scores = torch.einsum("thd,shd->hts", layer.turned_q, keys) * layer.q.shape[-1] ** -0.5

            def output(mask, scores=scores, values=values):
                weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
                return torch.einsum("hts,shd->thd", weights, values)

            for c, window in enumerate(measured.windows):
                seen = (distance >= 0) & ((distance < window) | (torch.arange(time) < sinks)[None])
                difference = output(seen) - output(distance >= 0)
                for head in range(layer.k.shape[1]):
                    only = torch.zeros_like(difference)
                    only[:, head * groups : (head + 1) * groups] = difference[:, head * groups : (head + 1) * groups]
                    residual = only.flatten(1) @ layer.output_weight.T
                    error = (residual**2).sum(-1).mean() * (layer.gradient**2).sum(-1).mean()
                    total[i, head, 0, c] += error / len(data)
    torch.testing.assert_close(measured.errors, total, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 2])
def test_errors_beside_a_linear_state_are_those_of_the_layer_itself(teacher, rows, monkeypatch):
    """With one kv head changed at a time: the mixer's output against attention's, on the sequences not fitted to."""
    monkeypatch.setattr(state_errors, "LINEAR_WINDOWS", state_errors.WINDOWS)
    ref, model = teacher
    teacher_model, data = zoo_teacher(*teacher, torch.float32), some_rows(rows, 32)
    measured = measure_states(teacher_model, data, 2, 5, [3, 0, 6], mixer_class("hedgehog"))
    assert measured.widths == (0, 3, 6) and measured.windows == (1, 2, 4, 8, 16)
    row = data[rows - 1]["input_ids"]
    observed = observe(teacher_model, row, True, 5 + rows - 1)
    seen: list = []
    hooks = [
        b.mixer.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
        for b in teacher_model.model.layers
    ]
    with torch.no_grad():
        teacher_model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    heads = measured.errors.shape[1]
    for j, width in ((1, 3), (2, 6)):
        for c, window in ((1, 2), (3, 8)):
            for head in range(heads):
                # Other heads see everything, so only this one's error is left.
                sizes = [[window if h == head else 40 for h in range(heads)]] * 2
                options = {"feature_map": "prototype", "num_sinks": 2, "feature_width": width, "window_sizes": sizes}
                recipe = Recipe("test", "hedgehog", [], student_options=options)
                config = student_config(ref, recipe, layer_types(ref, recipe, []))
                student = build_student(ref, model, config, "hedgehog", torch.float32, 0).eval()
                fit_layers(InMemoryLayers(teacher_model, student), data, ClosedForm(()), features=5)
                ctx = student.model.make_context(1, 32, row.device)
                for i, (block, (given, wanted)) in enumerate(zip(student.model.layers, seen, strict=True)):
                    with torch.no_grad():
                        difference = (block.mixer(given, None, ctx)[0] - wanted)[0]
                        weight = (observed[i].gradient ** 2).sum(-1).mean()
                    with_state = float((difference**2).sum(-1).mean() * weight)
                    alone = cut_error(observed[i], head, window, 2)
                    said = float(measured.errors[i, head, j, c] / measured.errors[i, head, 0, c])
                    assert said == pytest.approx(with_state / alone, rel=1e-2)


def cut_error(layer, head: int, window: int, sinks: int) -> float:
    """Weighted error of one kv head cut to a window and the sinks."""
    time, groups = len(layer.q), layer.q.shape[1] // layer.k.shape[1]
    distance = torch.arange(time)[:, None] - torch.arange(time)[None]
    queries = slice(head * groups, (head + 1) * groups)
    scores = (
        torch.einsum("thd,sd->hts", layer.turned_q[:, queries], layer.turned_k[:, head]) * layer.q.shape[-1] ** -0.5
    )
    cut = (distance >= 0) & ((distance < window) | (torch.arange(time) < sinks)[None])
    a, b = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ layer.v[:, head] for mask in (cut, distance >= 0))
    difference = torch.zeros(time, *layer.q.shape[1:])
    difference[:, queries] = (a - b).transpose(0, 1)
    residual = difference.flatten(1) @ layer.output_weight.T
    return float((residual**2).sum(-1).mean() * (layer.gradient**2).sum(-1).mean())


def test_between_measured_windows_the_gain_is_interpolated():
    values = torch.tensor([[0.5, 0.9]])
    got = state_errors._interpolated(values, [4, 64], [1, 4, 16, 64, 512])
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.5, 0.7, 0.9, 0.9]]))
    assert torch.equal(state_errors._interpolated(values[:, :1], [4], [1, 8]), torch.tensor([[0.5, 0.5]]))


def test_measuring_twice_gives_the_same_and_a_bfloat16_teacher_nearly(teacher):
    data = some_rows(1)
    once, twice = (measure_states(zoo_teacher(*teacher, torch.float32), data, 2, 0).errors for _ in range(2))
    assert torch.equal(once, twice)
    rough = measure_states(zoo_teacher(*teacher, torch.bfloat16), data, 2, 0).errors
    assert torch.corrcoef(torch.stack([once.flatten(), rough.flatten()]))[0, 1] > 0.98
