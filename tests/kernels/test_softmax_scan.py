"""What is particular to the softmax scan; what all recurrences share is in test_recurrences.py."""

from __future__ import annotations

import pytest
import torch
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from rnnzoo.kernels.dispatch import backends
from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.kernels.softmax_scan import SoftmaxState, softmax_scan, softmax_scan_step

from .cases_softmax_scan import RECURRENCES, make
from .recurrences import Shape, assert_close, cast, random_steps, run

BACKENDS = [status.backend for status in backends("softmax_scan")]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
OTHERS = ("head decay bonus", "channel", "channel decay", "channel bonus")
VARIANTS = (*RECURRENCES[0].variants, *OTHERS)


def call(backend, *inputs, **options):
    """softmax_scan, or a skipped test where the backend is not available."""
    try:
        return softmax_scan(*inputs, backend=backend, **options)
    except RnnzooError as error:
        pytest.skip(str(error))


@every_backend
def test_rwkv4_is_a_scan_with_scores_decay_and_bonus_per_channel(backend):
    torch.manual_seed(0)
    time_decay, time_first = torch.randn(24), torch.randn(24)
    key, value = 3 * torch.randn(2, 40, 24), torch.randn(2, 40, 24)
    expected, (numerator, denominator, maximum) = rwkv_linear_attention_cpu(
        time_decay, time_first, key, value, return_state=True
    )
    heads = (1, 24)
    found, state = call(
        backend,
        key.unflatten(2, heads),
        value.unflatten(2, heads),
        decay=-time_decay.exp().view(heads),
        bonus=time_first.view(heads),
    )
    torch.testing.assert_close(found.flatten(2), expected, rtol=1e-4, atol=1e-5)
    for own, other in zip(state, (maximum, numerator, denominator), strict=True):
        torch.testing.assert_close(own.flatten(1), other, rtol=1e-4, atol=1e-5)


@every_backend
def test_aaren_is_attention_of_one_query_over_every_prefix(backend):
    torch.manual_seed(0)
    k, v = 4 * torch.randn(2, 21, 3, 1), torch.randn(2, 21, 3, 24)
    found, state = call(backend, k, v)
    for t in range(21):
        weights = k[:, : t + 1].softmax(dim=1)
        torch.testing.assert_close(found[:, t], (weights * v[:, : t + 1]).sum(1))
    torch.testing.assert_close(state.maximum + state.denominator.log(), k.logsumexp(1))


@every_backend
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_score_is_too_large(backend, variant):
    torch.manual_seed(0)
    inputs = cast(RECURRENCES[0], make(Shape(1, 20, 2, 24), variant), torch.float32)
    inputs["k"] = inputs["k"].sign() * 1e4 * torch.rand_like(inputs["k"])
    inputs.pop("initial_state")
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    k, v = inputs.pop("k"), inputs.pop("v")
    out, state = call(backend, k, v, **inputs)
    assert out.isfinite().all() and out.abs().max() <= v.abs().max() * 1.0001
    assert all(x.isfinite().all() for x in state)
    gradients = torch.autograd.grad(out.square().sum() + state.numerator.sum(), (k, v, *inputs.values()))
    assert all(x.isfinite().all() for x in gradients)


@every_backend
@pytest.mark.parametrize("bonus", [False, True])
def test_a_score_of_minus_infinity_gives_no_weight(backend, bonus):
    torch.manual_seed(0)
    k, v = torch.randn(1, 6, 1, 24), torch.randn(1, 6, 1, 24)
    k[:, [0, 3]] = float("-inf")
    options = {"bonus": torch.randn(1, 24)} if bonus else {}
    out, state = call(backend, k, v, **options)
    there = [1, 2, 4, 5]
    expected, last = softmax_scan(k[:, there], v[:, there], backend="reference", **options)
    assert (out[:, 0] == 0).all()
    torch.testing.assert_close(out[:, there], expected)
    torch.testing.assert_close(tuple(state), tuple(last))


@every_backend
@pytest.mark.parametrize("variant", OTHERS)
def test_scores_a_head_or_a_channel_go_with_any_of_decay_and_bonus(backend, variant):
    inputs = cast(RECURRENCES[0], make(Shape(2, 21, 2, 24), variant), torch.float32)
    steps = random_steps(2, 21, 0.1, 0.2)
    call(backend, inputs["k"], inputs["v"])
    expected = run(RECURRENCES[0], cast(RECURRENCES[0], inputs, torch.float64), variant, "reference", **steps)
    assert_close(run(RECURRENCES[0], inputs, variant, backend, **steps), expected, 1e-5)


@every_backend
@pytest.mark.parametrize("variant", [VARIANTS[0], *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS[1:])])
def test_gradients_do_not_know_where_a_sequence_was_cut(backend, variant):
    torch.manual_seed(0)
    inputs = cast(RECURRENCES[0], make(Shape(1, 40, 2, 24), variant), torch.float32)
    leaves = [x.requires_grad_() for x in (*inputs.pop("initial_state"), *inputs.values())]
    maximum, numerator, denominator, *rest = leaves
    k, v, *parameters = rest
    parameters = dict(zip(list(inputs)[2:], parameters, strict=True))

    def gradients(edges):
        state, outputs = SoftmaxState(maximum, numerator, denominator), []
        for first, stop in zip(edges, edges[1:], strict=False):
            part = slice(first, stop)
            out, state = call(backend, k[:, part], v[:, part], initial_state=state, **parameters)
            outputs.append(out)
        loss = torch.cat(outputs, dim=1).sin().sum() + sum(x.cos().sum() for x in state)
        return torch.autograd.grad(loss, leaves)

    whole = gradients([0, 40])
    for edges in ([0, 1, 40], [0, 17, 39, 40]):
        for found, expected in zip(gradients(edges), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_backend
def test_the_state_is_a_pair_whatever_its_scale(backend):
    torch.manual_seed(0)
    inputs = cast(RECURRENCES[0], make(Shape(1, 9, 2, 24), "channel decay bonus"), torch.float32)
    state = SoftmaxState(*(x.requires_grad_() for x in inputs.pop("initial_state")))
    out, _ = call(backend, initial_state=state, **inputs)
    maximum, numerator, denominator = torch.autograd.grad(out.square().sum(), state)
    torch.testing.assert_close(maximum, state.numerator * numerator + state.denominator * denominator)
    scaled = SoftmaxState(state.maximum + 3, state.numerator * 0.049787068, state.denominator * 0.049787068)
    torch.testing.assert_close(call(backend, initial_state=scaled, **inputs)[0], out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", [status.backend for status in backends("softmax_scan_step")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_scan_and_change_the_state_in_place(backend, variant, dtype):
    torch.manual_seed(0)
    inputs = cast(RECURRENCES[0], make(Shape(2, 7, 3, 60), variant), dtype)
    expected, last = softmax_scan(**inputs, backend="reference")
    k, v = inputs.pop("k"), inputs.pop("v")
    state = SoftmaxState(*(x.clone() for x in inputs.pop("initial_state")))
    try:
        outputs = [softmax_scan_step(k[:, t], v[:, t], state, backend=backend, **inputs) for t in range(7)]
    except RnnzooError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(torch.stack(outputs, dim=1), expected)
    torch.testing.assert_close(tuple(state), tuple(last), rtol=1e-5, atol=1e-5)


def test_wrong_shapes_are_named():
    k, v = torch.zeros(2, 3, 4, 1), torch.zeros(2, 3, 4, 8)
    with pytest.raises(ShapeError, match=r"k has shape \(2, 3, 4, 2\)"):
        softmax_scan(k.expand(2, 3, 4, 2), v)
    with pytest.raises(ShapeError, match=r"decay has shape \(4, 8\); expected \(4, 1\)"):
        softmax_scan(k, v, decay=v[0, 0])
    with pytest.raises(ShapeError, match="initial_state's numerator"):
        softmax_scan(k, v, initial_state=SoftmaxState(k[:, 0], k[:, 0], k[:, 0]))
    with pytest.raises(ShapeError, match="do not fit"):
        softmax_scan_step(k[:, 0], v[:, 0], SoftmaxState(v[:, 0], v[:, 0], v[:, 0]))
