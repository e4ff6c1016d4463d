"""Chunked losses: equal to torch's, gradients included, and the logits of all tokens are never in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.kernels.losses import linear_cross_entropy, linear_kl, linear_top_kl

BACKENDS = ["reference", "chunked"]
repeatable = settings(derandomize=True, deadline=None, max_examples=30)


def make(seed, tokens, width=4, vocabulary=11, dtype=torch.float64):
    torch.manual_seed(seed)
    shapes = {"hidden": (tokens, width), "weight": (vocabulary, width), "bias": (vocabulary,)}
    return {name: torch.randn(*shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def assert_equal_with_gradients(found, expected, leaves, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    incoming = torch.randn(expected.shape, dtype=expected.dtype)
    for a, b in zip(
        torch.autograd.grad(found, leaves, incoming), torch.autograd.grad(expected, leaves, incoming), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@repeatable
@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([1, 5, 8, 17]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.sampled_from([0.0, 0.5]),
    chunk=st.sampled_from([1, 8, 100]),
    backend=st.sampled_from(BACKENDS),
)
def test_cross_entropy_equals_torchs(seed, tokens, reduction, ignored, chunk, backend):
    call = make(seed, tokens)
    labels = torch.randint(0, 11, (tokens,))
    labels[torch.rand(tokens) < ignored] = -100
    labels[0] = 3
    logits = F.linear(call["hidden"], call["weight"], call["bias"])
    expected = F.cross_entropy(logits, labels, reduction=reduction)
    found = linear_cross_entropy(**call, labels=labels, reduction=reduction, chunk_size=chunk, backend=backend)
    assert_equal_with_gradients(found, expected, list(call.values()))


@repeatable
@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([1, 8, 17]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weights=st.sampled_from(["none", "numbers", "mask"]),
    temperature=st.sampled_from([1.0, 2.5]),
    reverse=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_kl_equals_torchs(seed, tokens, reduction, weights, temperature, reverse, backend):
    call = make(seed, tokens)
    teacher_hidden, teacher_weight = torch.randn(tokens, 6).double(), torch.randn(11, 6).double()
    token_weights = {"none": None, "numbers": torch.rand(tokens).double(), "mask": torch.rand(tokens) < 0.6}[weights]
    student = (F.linear(call["hidden"], call["weight"], call["bias"]) / temperature).log_softmax(-1)
    teacher = ((teacher_hidden @ teacher_weight.t()) / temperature).log_softmax(-1)
    source, target = (teacher, student) if reverse else (student, teacher)
    expected = F.kl_div(source, target, log_target=True, reduction="none").sum(-1) * temperature**2
    counted = torch.ones(tokens).double() if token_weights is None else token_weights.double()
    expected = expected * counted
    if reduction != "none":
        expected = expected.sum() / (counted.sum().clamp(min=1e-30) if reduction == "mean" else 1)
    found = linear_kl(
        call["hidden"],
        call["weight"],
        teacher_hidden,
        teacher_weight,
        student_bias=call["bias"],
        weights=token_weights,
        temperature=temperature,
        reverse=reverse,
        chunk_size=5,
        reduction=reduction,
        backend=backend,
    )
    assert_equal_with_gradients(found, expected, list(call.values()))


def top_of(teacher, k):
    """(indices, log-probabilities, log of the rest) of log-probabilities (N, V)."""
    kept, indices = teacher.topk(k, -1)
    return indices, kept, teacher.scatter(1, indices, -torch.inf).logsumexp(-1)


@repeatable
@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([1, 8, 17]),
    k=st.sampled_from([1, 4, 10]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    reverse=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_kl_of_the_likeliest_equals_torchs_over_so_many_classes_and_the_rest(
    seed, tokens, k, reduction, reverse, backend
):
    call = make(seed, tokens)
    top = top_of(torch.randn(tokens, 11).double().mul(3).log_softmax(-1), k)
    student = F.linear(call["hidden"], call["weight"], call["bias"]).softmax(-1)
    chosen = student.gather(1, top[0])
    classes = [torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], 1).log(), torch.cat([top[1], top[2][:, None]], 1)]
    source, target = reversed(classes) if reverse else classes
    expected = F.kl_div(source, target, log_target=True, reduction="none").sum(-1)
    expected = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction]
    options = dict(student_bias=call["bias"], reverse=reverse, chunk_size=5, reduction=reduction, backend=backend)
    found = linear_top_kl(call["hidden"], call["weight"], *top, **options)
    assert_equal_with_gradients(found, expected, list(call.values()), 1e-8)


@pytest.mark.parametrize("reverse", [False, True])
def test_kl_of_all_but_one_class_is_the_whole_divergence(reverse):
    call, teacher = make(0, 9), torch.randn(9, 4).double()
    weight = torch.randn(11, 4).double()
    top = top_of((teacher @ weight.t()).log_softmax(-1), 10)
    whole = linear_kl(call["hidden"], call["weight"], teacher, weight, reverse=reverse)
    torch.testing.assert_close(linear_top_kl(call["hidden"], call["weight"], *top, reverse=reverse), whole)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_kl_of_the_likeliest_stays_finite_where_classes_vanish(scale, reverse):
    """In float32, with a rest of the student's or the teacher's that is far below the smallest number."""
    hidden, weight = torch.randn(6, 4).mul(scale).requires_grad_(), torch.randn(11, 4).requires_grad_()
    top = top_of((torch.randn(6, 11) * 200).log_softmax(-1), 3)
    loss = linear_top_kl(hidden, weight, *top, reverse=reverse)
    expected = linear_top_kl(hidden.double(), weight.double(), *top, reverse=reverse, backend="reference")
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-4)
    for found, wanted in zip(
        torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_wrong_shapes_of_the_likeliest_are_told():
    call = make(0, 5)
    top = top_of(torch.randn(5, 11).double().log_softmax(-1), 3)
    with pytest.raises(ShapeError, match=r"indices has shape \(5, 11\); expected \(5, 1 to 10\)"):
        linear_top_kl(call["hidden"], call["weight"], torch.zeros(5, 11).long(), *top[1:])
    with pytest.raises(ShapeError, match=r"log_rest has shape \(4,\)"):
        linear_top_kl(call["hidden"], call["weight"], *top[:2], top[2][:4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_z_loss_adds_the_squared_logsumexp(backend, reduction):
    call, labels = make(0, 9), torch.randint(0, 11, (9,))
    logits = F.linear(call["hidden"], call["weight"], call["bias"])
    expected = F.cross_entropy(logits, labels, reduction="none") + 0.1 * logits.logsumexp(-1).square()
    expected = expected.mean() if reduction == "mean" else expected
    found = linear_cross_entropy(**call, labels=labels, z_loss=0.1, chunk_size=4, reduction=reduction, backend=backend)
    assert_equal_with_gradients(found, expected, list(call.values()))


def test_gradients_go_to_the_student_only():
    student, teacher = make(0, 5), make(1, 5)
    loss = linear_kl(student["hidden"], student["weight"], teacher["hidden"], teacher["weight"])
    loss.backward()
    assert student["hidden"].grad is not None and student["weight"].grad is not None
    assert teacher["hidden"].grad is None and teacher["weight"].grad is None


def test_equal_predictions_have_no_divergence():
    call = make(0, 5)
    for reverse in (False, True):
        loss = linear_kl(call["hidden"], call["weight"], call["hidden"], call["weight"], reverse=reverse)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_predict(backend):
    """As torch: the mean over no tokens is nan, the sum zero; tokens that do not count may hold anything."""
    call, labels = make(0, 4), torch.full((4,), -100)
    assert linear_cross_entropy(**call, labels=labels, backend=backend).isnan()
    assert linear_cross_entropy(**call, labels=labels, reduction="sum", backend=backend) == 0
    assert not linear_cross_entropy(**call, labels=labels, reduction="none", backend=backend).any()
    none = linear_kl(
        call["hidden"], call["weight"], call["hidden"], call["weight"], weights=labels > 0, backend=backend
    )
    assert none == 0


def test_ignored_tokens_may_hold_nan():
    call, labels = make(0, 4), torch.tensor([1, -100, 2, -100])
    hidden = torch.where((labels >= 0)[:, None], call["hidden"], torch.nan)
    kept = linear_cross_entropy(hidden[labels >= 0], call["weight"], labels[labels >= 0])
    assert linear_cross_entropy(hidden, call["weight"], labels) == kept
    kl = linear_kl(hidden, call["weight"], hidden, call["weight"], weights=labels >= 0)
    assert kl.isfinite()


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes (views of its arguments are not made)."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_the_logits_of_all_tokens_never_exist(loss, reduction):
    tokens, vocabulary, chunk = 64, 100, 8
    call = make(0, tokens, vocabulary=vocabulary, dtype=torch.float32)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[::5] = -100
    kept = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        if loss == "kl":
            value = linear_kl(
                call["hidden"], call["weight"], call["hidden"], call["weight"], chunk_size=chunk, reduction=reduction
            )
        else:
            value = linear_cross_entropy(**call, labels=labels, chunk_size=chunk, reduction=reduction)
        value.sum().backward()
    assert largest.numel == chunk * vocabulary
    assert max(x.numel() for x in kept) < tokens * vocabulary / 4


def test_a_frozen_head_costs_no_gradient_of_its_size():
    call = make(0, 64, width=16, vocabulary=1000, dtype=torch.float32)
    hidden, weight, labels = call["hidden"], call["weight"].detach(), torch.randint(0, 1000, (64,))
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk_size=2).backward()
    assert hidden.grad is not None
    assert largest.numel < 1000 * 16


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_bfloat16_products_with_a_float32_softmax_are_close(loss):
    call = make(0, 40, width=16, vocabulary=50)
    labels = torch.randint(0, 50, (40,))

    def run(dtype):
        hidden, weight = (call[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight"))
        if loss == "kl":
            value = linear_kl(hidden, weight, hidden.detach().flip(0), weight.detach())
        else:
            value = linear_cross_entropy(hidden, weight, labels)
        grads = torch.autograd.grad(value, [hidden, weight])
        assert [g.dtype for g in grads] == [dtype, dtype]
        return [value, *grads]

    assert run(torch.bfloat16)[0].dtype == torch.float32
    for found, expected in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert (found - expected).norm() / expected.norm() < 0.03


def test_under_autocast_the_products_run_in_its_dtype():
    call = make(0, 9, dtype=torch.float32)
    labels = torch.randint(0, 11, (9,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(**call, labels=labels)
    expected = linear_cross_entropy(call["hidden"].bfloat16(), call["weight"], labels, bias=call["bias"])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.autograd.grad(found, call["weight"])[0].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_those_of_finite_differences(backend, reduction):
    call = make(0, 3, width=2, vocabulary=4)
    labels, teacher, teacher_weight = torch.tensor([1, -100, 3]), torch.randn(3, 2).double(), torch.randn(4, 2).double()

    def both(hidden, weight, bias):
        options = {"reduction": reduction, "chunk_size": 2, "backend": backend}
        entropy = linear_cross_entropy(hidden, weight, labels, bias=bias, z_loss=0.1, **options)
        return entropy, linear_kl(
            hidden, weight, teacher, teacher_weight, student_bias=bias, temperature=2.0, **options
        )

    assert torch.autograd.gradcheck(both, tuple(call.values()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, ShapeError, r"hidden has shape \(2, 3, 4\); expected \(tokens, width\)"),
        ({"weight": torch.zeros(5, 3)}, ShapeError, r"weight has shape \(5, 3\); expected \(vocabulary, 4\)"),
        ({"labels": torch.zeros(7, dtype=torch.long)}, ShapeError, r"labels is torch.int64 of shape \(7,\)"),
        ({"labels": torch.zeros(6)}, ShapeError, "labels is torch.float32"),
        ({"bias": torch.zeros(4)}, ShapeError, r"bias has shape \(4,\); expected \(5,\)"),
        ({"reduction": "max"}, RnnzooError, "reduction is 'max'"),
        ({"chunk_size": 0}, RnnzooError, "chunk_size is 0"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    call = {"hidden": torch.zeros(6, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(6, dtype=torch.long)}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**call, **change})


def test_wrong_teachers_are_named():
    hidden, weight = torch.zeros(6, 4), torch.zeros(5, 4)
    with pytest.raises(ShapeError, match="teacher_hidden has 7 tokens; expected 6"):
        linear_kl(hidden, weight, torch.zeros(7, 3), torch.zeros(5, 3))
    with pytest.raises(ShapeError, match="teacher_weight has 8 rows; expected 5"):
        linear_kl(hidden, weight, torch.zeros(6, 3), torch.zeros(8, 3))
    with pytest.raises(RnnzooError, match="temperature is 0"):
        linear_kl(hidden, weight, hidden, weight, temperature=0)
